"""The worker on GPUs: what it registers, which layers it accepts, and what it counts. vLLM's worker is a fake."""

from __future__ import annotations

import inspect
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup
from vllm.v1.worker.worker_base import WorkerBase

from starling.attention_backends.paged import NAME
from starling.attention_backends.star.backend import WRAPPED
from starling.attention_backends.star.gpu_impl import attends_by_parts
from starling.attention_backends.star.rows import is_split
from starling.engine_ext.worker.star_worker import make_star_worker, unsplit_layers
from starling.scheduler.planning.plan import DenseHeads, StarPlan
from tests.unit.attention_backends.test_step import SPEC
from tests.unit.engine_ext.configs import FULL, drafting, fake_config

WORKER = "starling.engine_ext.worker.star_worker"
DOCUMENTS = "starling.attention_backends.star.document_layers"


class FakeWorker:
    """A worker of vLLM whose model runner is a fake, and whose warm-up is that of vLLM's V2 model runner."""

    rank = 0

    def __init__(self, vllm_config):
        self.vllm_config = vllm_config
        self.executed = []
        group = SimpleNamespace(kv_cache_spec=SPEC)
        self.model_runner = SimpleNamespace(
            is_pooling_model=False,
            max_num_reqs=8,
            max_model_len=1024,
            num_speculative_steps=0,
            speculative_config=None,
            model_state=None,
            model_config=SimpleNamespace(get_vocab_size=lambda: 100),
            vllm_config=SimpleNamespace(
                num_lookahead_tokens=0, parallel_config=SimpleNamespace(decode_context_parallel_size=1)
            ),
            kv_cache_config=SimpleNamespace(kv_cache_groups=[group], num_blocks=100),
            kv_connector=SimpleNamespace(set_disabled=lambda disabled: None),
            get_model=torch.nn.Module,
        )

    def load_model(self):
        pass

    def initialize_from_config(self, kv_cache_config):
        pass

    def compile_or_warm_up_model(self):
        assert run_mixed_prefill_decode_warmup(self.model_runner, self.execute_model, self.sample_tokens, 20)
        return "times"

    def execute_model(self, scheduler_output):
        self.executed.append(scheduler_output.total_num_scheduled_tokens)

    def sample_tokens(self, grammar_output):
        pass


def make_worker(mode="off", **changes):
    given = {"parallel_config__data_parallel_index": 7, "model_config__get_hidden_size": lambda: 64}
    given |= {"model_config__dtype": torch.bfloat16}
    given |= {"additional_config": {"starling": {"star": mode}}}
    return make_star_worker(FakeWorker)(fake_config(**given | changes))


@pytest.fixture(autouse=True)
def unregistered():
    yield
    for name in (*WRAPPED, NAME):
        AttentionBackendEnum[name].clear_override()


NO_LAYERS = fake_config(compilation_config__static_forward_context={})


FOR_DOCUMENTS = FULL | {"model_config__uses_mrope": False, "cache_config__cache_dtype": "auto"}
REFUSED = {"speculative_config": drafting("medusa")}


@pytest.mark.parametrize(
    ("device", "refused", "wrapped"),
    [("cuda", {}, True), ("cuda", REFUSED, False), ("cpu", {}, True), ("cpu", REFUSED, True)],
)
def test_backends_are_wrapped_where_star_can_run_and_on_cpu_for_its_op(device, refused, wrapped):
    make_worker(device_config__device_type=device, **refused)
    assert all(AttentionBackendEnum[name].is_overridden() == wrapped for name in WRAPPED)


@pytest.mark.parametrize(("refused", "star"), [({}, "Star"), (REFUSED, "")])
@pytest.mark.parametrize(("setting", "name"), [("triton", "TritonBackend"), ("xformers", "XformersBackend")])
def test_a_worker_registers_the_backend_that_gpu_attention_names(setting, name, refused, star):
    make_worker(
        device_config__device_type="cuda", additional_config={"starling": {"gpu_attention": setting}}, **refused
    )
    backend = AttentionBackendEnum[NAME].get_class()
    assert (backend.__name__, backend.get_name()) == (star + name, NAME)


@pytest.mark.parametrize(("options", "made"), [({"star_segments": "auto"}, True), ({}, False)])
def test_tables_of_angles_are_made_with_the_weights_and_so_counted_before_the_kv_cache_is_sized(
    options, made, monkeypatch
):
    """67 MB at 128k tokens, 537 MB at 1M."""
    monkeypatch.setattr(f"{DOCUMENTS}.before_forward", lambda *args: None)
    worker = make_worker(**FOR_DOCUMENTS | {"additional_config": {"starling": options}})
    assert worker.documents.rotations is None
    worker.load_model()
    assert (worker.documents.rotations is not None) == made


def test_no_backend_is_registered_where_vllm_chooses():
    make_worker(device_config__device_type="cuda")
    assert not AttentionBackendEnum[NAME].is_overridden()


def test_an_engine_that_refuses_star_keeps_the_full_graphs_of_its_backend():
    plain = AttentionBackendEnum.TRITON_ATTN.get_class().get_builder_cls()
    make_worker(**REFUSED)
    assert AttentionBackendEnum.TRITON_ATTN.get_class().get_builder_cls() is plain
    make_worker()
    star = AttentionBackendEnum.TRITON_ATTN.get_class().get_builder_cls()
    assert star is not plain
    assert star.get_cudagraph_support(None, SPEC).value < plain.get_cudagraph_support(None, SPEC).value


def test_an_engine_with_blocks_with_positions_of_their_own_has_full_graphs_of_single_tokens_alone():
    """Its layers run Starling's kernels in the steps of such prompts, and its graphs have them."""
    own = {"starling": {"star_segments": "auto"}}
    make_worker(**FOR_DOCUMENTS | {"additional_config": own})
    star = AttentionBackendEnum.TRITON_ATTN.get_class()
    assert star.__name__ == "StarTritonAttentionBackendByParts" == star.__qualname__
    assert resolve_obj_by_qualname(f"{star.__module__}.{star.__name__}") is star
    layer = SimpleNamespace(impl=object.__new__(star.get_impl_cls()))
    assert attends_by_parts(layer.impl)
    config = fake_config(compilation_config__static_forward_context={"layer": layer})
    support, levels = star.get_builder_cls().get_cudagraph_support, AttentionCGSupport
    assert support(config, SPEC) is levels.UNIFORM_BATCH, "the layer's queries can't be re-rotated"
    layer.impl.rotation = "a rotation"
    assert support(config, SPEC) is levels.UNIFORM_SINGLE_TOKEN_DECODE
    for refused in ({}, {"additional_config": own, "cache_config__cache_dtype": "fp8_e4m3"}):
        make_worker(**FOR_DOCUMENTS | refused)
        plain = AttentionBackendEnum.TRITON_ATTN.get_class()
        assert plain.__name__ == "StarTritonAttentionBackend"
        assert not attends_by_parts(plain.get_impl_cls()), "documents are refused with such a cache"
        assert plain.get_builder_cls().get_cudagraph_support(config, SPEC) is levels.UNIFORM_BATCH


def test_an_engine_that_is_started_for_dense_heads_keeps_full_graphs_of_decode_batches():
    """Its decode steps have no step of Starling's, since each head sees everything then."""
    make_worker(additional_config={"starling": {"star_dense_heads": 0.25}})
    star = AttentionBackendEnum.TRITON_ATTN.get_class()
    assert star.get_impl_cls().__name__ == "ByPartsTritonAttentionImpl"
    assert star.get_builder_cls().get_cudagraph_support(NO_LAYERS, SPEC) is AttentionCGSupport.UNIFORM_BATCH
    plan = StarPlan(64, 16, 0, 300, 320, dense_heads=DenseHeads(1, 4, "digest"))
    assert is_split(plan, 299) and not is_split(plan, 300) and not is_split(plan, 320)
    make_worker()
    assert AttentionBackendEnum.TRITON_ATTN.get_class().get_impl_cls().__name__ == "TritonAttentionImpl"


@pytest.mark.parametrize("started_for", ["star_dense_heads=0.25", "star_heads=scores.json", None])
def test_layers_that_can_not_attend_in_several_calls_end_the_start_of_a_server_for_dense_heads(
    started_for, monkeypatch
):
    """Another server does not look at them: no prompt of it has dense heads."""
    attention = SimpleNamespace(
        attn_type="decoder",
        impl=SimpleNamespace(alibi_slopes=None, sliding_window=(-1, -1)),
        kv_cache_dtype="nvfp4",
        _k_scale=torch.tensor(1.0),
        _v_scale=torch.tensor(1.0),
    )

    monkeypatch.setattr(f"{WORKER}.metadata_builders", lambda runner: [(SPLITS, ["layer"])])
    monkeypatch.setattr(f"{DOCUMENTS}.scores_of", lambda config: SimpleNamespace(order_digest="order"))
    monkeypatch.setattr(f"{DOCUMENTS}.ranks_of_layers", lambda *args: ({"layer": [0]}, None))
    blocks = {"layer": SimpleNamespace(attention=attention)}
    monkeypatch.setattr(f"{DOCUMENTS}.attention_blocks", lambda model: blocks)
    entry = {"star": "auto"} | (dict([started_for.split("=")]) if started_for else {})
    worker = make_worker(additional_config={"starling": entry})
    reason = f"{started_for}: layer layer: its cache is nvfp4"
    with pytest.raises(RuntimeError, match=reason) if started_for else nullcontext():
        worker.initialize_from_config(None)
    attention.kv_cache_dtype = "auto"
    worker.initialize_from_config(None)
    heads = worker.heads
    assert heads.problem is None and heads.ranks == {"layer": [0]}


@pytest.mark.parametrize(("device", "segments", "looks"), [("cuda", "off", 0), ("cuda", "auto", 1), ("cpu", "off", 1)])
def test_layers_are_looked_at_only_where_their_queries_may_be_turned(device, segments, looks, monkeypatch):
    """On a GPU a server says at its start whether it takes documents."""
    seen = []
    monkeypatch.setattr(f"{DOCUMENTS}.block_positions_problem", lambda *args: seen.append(args) or "a reason")
    monkeypatch.setattr(f"{WORKER}.metadata_builders", lambda runner: [(SPLITS, ["layer"])])
    config = {"starling": {"star_segments": segments}}
    on_device = {"device_config__device_type": device, "additional_config": config}
    if device == "cuda":
        on_device = FOR_DOCUMENTS | on_device
    worker = make_worker(**on_device)
    worker.load_model()
    assert len(seen) == (looks if device == "cuda" else 0), "before graphs are captured"
    worker.initialize_from_config(None)
    assert [args[-1] for args in seen] == [torch.bfloat16] * looks, "the dtype of the model"


@pytest.mark.parametrize("mode", ["off", "auto", "on"])
def test_what_layers_can_not_run_is_refused_or_not_captured_once_the_model_is_loaded(mode, monkeypatch):
    """vLLM captures graphs before there is a KV cache, to learn what they take."""
    monkeypatch.setattr(f"{DOCUMENTS}.block_positions_problem", lambda *args: "a reason")
    warned = []
    monkeypatch.setattr(f"{DOCUMENTS}.logger.warning", lambda text, *args: warned.append(text % args))
    config = {"starling": {"star": mode, "star_segments": "auto"}}
    worker = make_worker(**FOR_DOCUMENTS | {"additional_config": config})
    refusal = "star_segments=auto is refused: a reason. Allowed for this model: off"
    with pytest.raises(RuntimeError, match=refusal) if mode != "off" else nullcontext():
        worker.load_model()
    assert worker.documents.problem == "a reason" and worker.documents.rotations is None
    if mode == "off":
        assert warned == ["star_segments=auto has no effect here: a reason"]
        builder = AttentionBackendEnum.FLASH_ATTN.get_class().get_builder_cls()
        assert builder.get_cudagraph_support(NO_LAYERS, SPEC) is AttentionCGSupport.UNIFORM_BATCH


def test_the_tokens_of_vllms_warm_up_are_not_counted(monkeypatch):
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: None)  # since vLLM 0.34 after each step
    worker = make_worker()
    counted = worker.computed_tokens._value.get()
    assert worker.compile_or_warm_up_model() == "times"
    assert sum(worker.executed) == 2 + 20
    assert worker.computed_tokens._value.get() == counted
    step = SchedulerOutput.make_empty()
    step.total_num_scheduled_tokens = 5
    worker.execute_model(step)
    assert worker.computed_tokens._value.get() == counted + 5


@pytest.mark.parametrize(
    ("device", "segments", "warmed"), [("cuda", "auto", True), ("cuda", "off", False), ("cpu", "off", False)]
)
def test_kernels_of_steps_over_documents_are_warmed_up_on_a_gpu_before_vllm_watches_for_compiled_ones(
    device, segments, warmed, monkeypatch
):
    """vLLM 0.33 begins to watch at the end of its own warm-up. Layers of another implementation are left out."""
    calls = []
    layers = {
        "full": SimpleNamespace(impl=SimpleNamespace(attends_by_parts=True)),
        "window": SimpleNamespace(impl=SimpleNamespace()),
    }
    blocks = {name: SimpleNamespace(attention=layer) for name, layer in layers.items()}
    rotations = {"full": "a rotation", "window": "a rotation"}
    monkeypatch.setattr(f"{DOCUMENTS}.attention_blocks", lambda model: blocks)
    monkeypatch.setattr(f"{DOCUMENTS}.block_positions_problem", lambda *args: None)
    monkeypatch.setattr(f"{DOCUMENTS}.make_rotations", lambda *args: rotations)
    monkeypatch.setattr(f"{DOCUMENTS}.before_forward", lambda *args: None)
    monkeypatch.setattr(f"{WORKER}.metadata_builders", lambda runner: [(SPLITS, ["full"])])
    monkeypatch.setattr("starling.attention_backends.star.document_layers.warm_up", lambda *args: calls.append(args))
    monkeypatch.setattr(FakeWorker, "compile_or_warm_up_model", lambda self: calls.append("vLLM's"))
    given = {"device_config__device_type": device, "additional_config": {"starling": {"star_segments": segments}}}
    worker = make_worker(**(FOR_DOCUMENTS if device == "cuda" else {}) | given)
    worker.load_model()
    worker.initialize_from_config(None)
    worker.compile_or_warm_up_model()
    assert calls == [([layers["full"]],)] * warmed + ["vLLM's"]


def test_vllm_still_warms_up_its_kernels_in_the_method_that_is_overridden():
    worker = gpu_worker.Worker
    # Since vLLM 0.33 the method calls another one for the work.
    source = inspect.getsource(getattr(worker, "_compile_or_warm_up_model", worker.compile_or_warm_up_model))
    assert "kernel_warmup(self)" in source and "self.model_runner, self.execute_model" in source
    assert "compile_or_warm_up_model" in vars(WorkerBase)


class TurboQuantMetadataBuilder:
    """A builder of full-attention layers that is not wrapped."""

    kv_cache_spec = SPEC


SPLITS = SimpleNamespace(takes_star=True, kv_cache_spec=SPEC)
OTHER = SimpleNamespace(kv_cache_spec=None)
SHIFT_STATE = SimpleNamespace(holds_keys=False, kv_cache_spec=SPEC)


@pytest.mark.parametrize(
    ("builders", "problem"),
    [
        ([SPLITS], None),
        ([SPLITS, OTHER, SHIFT_STATE], None),
        ([TurboQuantMetadataBuilder()], "full-attention layers.*TurboQuantMetadataBuilder$"),
        ([SPLITS, TurboQuantMetadataBuilder()], "full-attention layers.*TurboQuantMetadataBuilder$"),
        ([OTHER], "all layers.*SimpleNamespace$"),
    ],
    ids=["star", "beside layers of other kinds", "none", "some only", "no full attention"],
)
def test_all_full_attention_layers_must_split_their_rows(builders, problem, monkeypatch):
    """vLLM leaves some layers of a TURBOQUANT model to FLASH_ATTN."""
    layers = [(builder, ["layer"]) for builder in builders]
    assert (unsplit_layers(layers) is None) == (problem is None)
    monkeypatch.setattr(f"{WORKER}.metadata_builders", lambda runner: layers)
    for mode in ("on", "auto", "off"):
        worker = make_worker(mode)
        with pytest.raises(RuntimeError, match=problem) if problem and mode == "on" else nullcontext():
            worker.initialize_from_config(None)
        assert worker.star_problem is None if problem is None else re.search(problem, worker.star_problem)
