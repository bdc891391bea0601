"""Activation through vLLM's own EngineArgs: what it sets, what it refuses, and engines without it."""

from __future__ import annotations

import contextlib
import inspect
import json
import pickle
from types import SimpleNamespace

import pytest
from vllm.config.utils import replace
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler

from benchmarks.attamba.random_model import make_random_attamba
from benchmarks.random_llama import make_random_llama, make_tiny_llama
from starling.attention_backends.star.refusals import document_refusals, star_refusals
from starling.config.entry import parse_config
from starling.config.parsing import OptionError
from starling.engine_ext.engine_core import FeatureMixin
from starling.engine_ext.start import activation, plugin
from starling.engine_ext.start.activation import (
    MIDDLEWARE,
    OUTERMOST,
    PAGE_MIDDLEWARE,
    SCHEDULERS,
    before_engine_config,
    is_one_host,
    prepare_server,
    star_class,
)
from starling.features.reuse.core import reuse_refusal
from starling.scheduler.planning.request_metadata import ONE_HOST, default_num_shards
from starling.scheduler.star_scheduler import StarMixin
from tests.parity.harness import TINY
from tests.unit.engine_ext.configs import fake_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plugin.register()
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


def engine_config(model, **arguments):
    return EngineArgs(model=str(model), enforce_eager=True, **arguments).create_engine_config()


def test_activated_engines_get_starlings_scheduler_and_worker(model):
    config = engine_config(model, additional_config={"starling": {"star": "on", "star_block_size": 256}})
    assert config.parallel_config.worker_cls == "starling.engine_ext.worker.star_worker.StarCPUWorker"
    assert config.scheduler_config.get_scheduler_cls().__name__ == "StarScheduler"
    assert star_refusals(config) == []


def compile_key(config) -> str:
    """Return vLLM's key of the code that it compiles for a configuration."""
    if hasattr(config, "compute_hash"):  # before vLLM 0.34
        return config.compute_hash()
    from vllm.config.utils import hash_config

    return hash_config(config)


def test_options_do_not_change_vllms_key_of_compiled_code(model):
    """Also in a worker, which gets the configuration as a copy. With an entry of another's, vLLM's rule holds."""
    entries = [{"star": "on", "star_block_size": size, "star_replicas": 1} for size in (256, 512)]
    one, other = (engine_config(model, additional_config={"starling": entry}) for entry in entries)
    assert compile_key(one) == compile_key(other)
    for copied in (pickle.loads(pickle.dumps(one)), replace(one, instance_id="another")):
        assert parse_config(copied.additional_config) == parse_config({"starling": entries[0]})
        assert compile_key(copied) == compile_key(one)
    hashes = {compile_key(engine_config(model, additional_config={"starling": entry, "more": 1})) for entry in entries}
    assert len(hashes) == 2


def test_a_server_whose_documents_start_with_more_than_a_token_does_not_start(tmp_path):
    """Its tokenizer has a token for each character; that of another engine, without one, is not looked at."""
    model, entry = make_tiny_llama(tmp_path), {"starling": {"star_segments": "<nope>"}}
    with pytest.raises(ValueError, match="star_segments='<nope>' is refused: it is not one token of the model's token"):
        engine_config(model, additional_config=entry)
    engine_config(model, additional_config={"starling": {"star_segments": "|"}})
    engine_config(model, additional_config=entry, skip_tokenizer_init=True)


@pytest.mark.parametrize(("attention", "warns"), [("vllm", True), ("auto", False)])
def test_a_server_that_is_started_for_documents_and_can_have_none_says_so(model, monkeypatch, attention, warns):
    """With star off by default it starts, as only requests that turn star on could have documents."""
    warned = []
    monkeypatch.setattr(activation.logger, "warning", lambda text, *args: warned.append(text % args))
    engine_config(model, additional_config={"starling": {"star_segments": "auto", "cpu_attention": attention}})
    assert [line.startswith("star_segments=auto has no effect here: cpu_attention=vllm") for line in warned] == (
        [True] if warns else []
    )


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            {"preset": "long"},
            "star_min_tokens=16384 of preset long is above max_model_len=4096. Give --star-min-tokens",
        ),
        ({"star": "auto"}, "star_min_tokens=32768 is above max_model_len=4096. Give --star-min-tokens 1024"),
        ({"preset": "long", "star_min_tokens": 1024}, None),
    ],
)
def test_a_server_none_of_whose_prompts_can_be_star_says_so(model, monkeypatch, entry, says):
    warned = []
    monkeypatch.setattr(activation.logger, "warning", lambda text, *args: warned.append(text % args))
    engine_config(model, max_model_len=4096, additional_config={"starling": entry})
    found = [line for line in warned if line.startswith("No prompt will be star: ")]
    assert len(found) == (says is not None) and all(says in line for line in found)


def test_engines_without_the_entry_are_vllms(model):
    config = engine_config(model, additional_config={"other": 1})
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls is None


def test_a_front_that_would_not_call_starling_is_refused(model, monkeypatch):
    """`vllm serve` with its Rust front would activate Starling in the engine, and plan no prompt."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    arguments = {"model": str(model), "additional_config": {"starling": {}}}
    with pytest.raises(OptionError, match="VLLM_USE_RUST_FRONTEND='1' is refused: the Rust front reads no star"):
        before_engine_config(AsyncEngineArgs(**arguments))
    before_engine_config(EngineArgs(**arguments))  # no front
    before_engine_config(AsyncEngineArgs(**arguments | {"additional_config": {}}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "scheduler_cls=.*Starling sets this class",
        ),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "worker_cls=.*Starling sets this class"),
        ({"entry": {"star": "on", "star_block_size": 100}}, "star_block_size=100.*multiple of the KV page of 128"),
        (
            {"entry": {"star": "on", "star_block_size": 256, "star_anchor_size": 512}},
            "star_anchor_size=512.*larger than",
        ),
        ({"entry": {"star_block": 100}}, "starling.star_block=100.*no such option, did you mean star_block_size"),
        ({"entry": {"star": {"mode": "on"}}}, "star=.*must be one of off, on, auto"),
        ({"entry": {"scheduler": "on"}}, r"starling\.scheduler='on'.*must be an object"),
        ({"entry": {"scheduler": {"fairness": "no"}}}, r"starling\.scheduler\.fairness='no'.*on or off"),
        ({"entry": {"stars": {}}}, "starling.stars=.*no such option, did you mean star"),
        ({"entry": "yes"}, "starling='yes'.*must be an object"),
        ({"entry": {"replicas": 30}}, r"starling\.replicas=30.*must be an object"),
        ({"entry": {"replicas": {"timeout": 0}}}, r"starling\.replicas\.timeout=0.*a number above 0"),
        ({"entry": {"cpu_attention": "ours"}}, r"starling\.cpu_attention='ours'.*auto or vllm"),
        ({"entry": {"live_page": True}}, r"starling\.live_page=True.*off or on"),
        ({"entry": {"live_page": "on"}}, r"starling\.live_page='on'.*only a server has a page"),
        (
            {
                "entry": {"star": "auto"},
                "kv_sharing_fast_prefill": True,
            },
            "star='auto' is refused: KV-sharing fast prefill",
        ),
    ],
)
def test_options_that_exclude_one_another_are_refused_at_the_start(model, arguments, message):
    entry = arguments.pop("entry", {})
    with pytest.raises(ValueError, match=message):
        engine_config(model, additional_config={"starling": entry}, **arguments)


def test_a_file_of_scores_that_would_have_no_effect_is_refused_at_the_start(tmp_path):
    plugin.register()
    model = make_random_attamba(tmp_path / "attamba", hidden_size=64, num_attention_heads=2, token_chunk=8)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": [[0.1, 0.2]] * layers}))
    entry = {"star_heads": str(path)}
    with pytest.raises(ValueError, match=r"starling\.star_heads=.*: an Attamba model.*Allowed: a server without it"):
        engine_config(model, additional_config={"starling": entry})
    engine_config(model, additional_config={"starling": entry | {"star_dense_heads": 0}})


@pytest.mark.parametrize(
    ("star", "message"),
    [
        ({"star_block_size": 256}, None),
        ({"star_block_size": 64}, "star_block_size=64 is refused.*page of 128.*a multiple of 128"),
        ({"star_block_size": 256, "star_overlap_size": 128}, "star_overlap_size=128 is refused.*Attamba.*Allowed: 0"),
    ],
)
def test_sizes_of_attamba_are_checked_against_its_pages_of_chunk_states(tmp_path, star, message):
    plugin.register()
    model = make_random_attamba(tmp_path / "attamba", hidden_size=64, num_attention_heads=2, token_chunk=8)
    refused = contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with refused:
        engine_config(model, additional_config={"starling": {"star": "on"} | star})


def test_star_off_by_default_starts_and_refuses_per_request(model):
    config = engine_config(model, additional_config={"starling": {}}, kv_sharing_fast_prefill=True)
    assert any("fast prefill" in reason for reason in star_refusals(config))


def test_speculative_decoding_keeps_star_and_nothing_that_is_not_tried_with_it(model):
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    star = {"starling": {"star": "auto"}}
    config = engine_config(model, additional_config=star, speculative_config=speculative)
    assert star_refusals(config) == []
    assert any("speculative decoding" in reason for reason in document_refusals(config))
    assert "speculative decoding" in reuse_refusal(config)


NEMOTRON_H = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "layers_block_type": ["mamba", "attention"],
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
}
"""Of the only architecture for which vLLM takes --use-replayssm. There are no weights: no engine is started."""


def test_beside_replayssm_a_server_starts_with_star_off_and_refuses_it(tmp_path):
    """Its per-row positions come with the metadata of every layer, and virtual_metadata would end the engine."""
    (tmp_path / "config.json").write_text(json.dumps(NEMOTRON_H))

    def config(mode):
        given = {"starling": {"star": mode}}
        return engine_config(tmp_path, skip_tokenizer_init=True, use_replayssm=True, additional_config=given)

    (reason,) = star_refusals(config("off"))
    assert reason.startswith("--use-replayssm")
    with pytest.raises(OptionError, match=r"star='auto' is refused: --use-replayssm: .* Allowed: off"):
        config("auto")


def test_the_server_gets_the_middleware_once():
    args = SimpleNamespace(additional_config={"starling": {}}, middleware=["theirs"])
    prepare_server(args)
    prepare_server(args)
    assert args.middleware == ["theirs", *MIDDLEWARE, OUTERMOST]
    plain = SimpleNamespace(additional_config={}, middleware=[])
    prepare_server(plain)
    assert plain.middleware == []


def live_page_args(**more):
    args = {"additional_config": {"starling": {"live_page": "on"} | more}, "middleware": [], "api_key": None}
    return SimpleNamespace(**args, disable_access_log_for_endpoints="/health")


def test_the_live_page_is_a_middleware_where_it_is_on(monkeypatch):
    monkeypatch.delenv("STARLING_ADMIN_KEY", raising=False)
    args = live_page_args()
    for _ in range(2):
        prepare_server(args)
    assert args.middleware == [*MIDDLEWARE, PAGE_MIDDLEWARE, OUTERMOST]
    assert all(inspect.isclass(resolve_obj_by_qualname(name)) for name in (*MIDDLEWARE, PAGE_MIDDLEWARE, OUTERMOST))
    assert args.disable_access_log_for_endpoints == "/health,/starling/live.json"


def test_clients_that_must_not_learn_of_one_another_do_not_see_the_live_page(monkeypatch):
    monkeypatch.delenv("STARLING_ADMIN_KEY", raising=False)
    args = live_page_args(cache_salt="required")
    with pytest.raises(OptionError, match=r"live_page='on' is refused: with cache_salt=required .*STARLING_ADMIN_KEY"):
        prepare_server(args)
    monkeypatch.setenv("STARLING_ADMIN_KEY", "key")
    prepare_server(args)


def test_no_entry_is_no_activation():
    assert parse_config(None) is None
    assert parse_config({"other": {}}) is None
    assert parse_config({"starling": {}}).star.mode == "off"
    with pytest.raises(OptionError):
        parse_config({"starling": {"star": "sometimes"}})


def test_a_diffusion_model_keeps_the_scheduler_that_vllm_has_for_it(model):
    """vLLM takes that scheduler where the server has --diffusion-config, whatever the model."""
    given = {"diffusion_config": {"canvas_length": 8}}
    plain = engine_config(model, **given).scheduler_config.get_scheduler_cls()
    config = engine_config(model, additional_config={"starling": {}}, **given)
    star = config.scheduler_config.get_scheduler_cls()
    assert plain is DiffusionScheduler
    assert issubclass(star, plain) and issubclass(star, StarMixin)


def test_every_scheduler_of_starling_is_one_of_vllm_with_the_mixin_before_it():
    for base, star in SCHEDULERS.items():
        assert resolve_obj_by_qualname(star).__bases__ == (FeatureMixin, resolve_obj_by_qualname(base))


def test_a_class_that_vllm_has_chosen_and_starling_does_not_know_is_refused():
    with pytest.raises(OptionError, match=r"scheduler_cls='theirs' is refused: vLLM has chosen.*Allowed: vllm.v1.core"):
        star_class("scheduler_cls", "theirs", SCHEDULERS)


def test_an_engine_of_several_replicas_gets_the_star_connector_where_prompts_can_be_split(model):
    several = engine_config(model, additional_config={"starling": {}}, data_parallel_size=2)
    assert several.kv_transfer_config.kv_connector == "StarConnector"
    assert engine_config(model, additional_config={"starling": {}}).kv_transfer_config is None
    off = {"data_parallel_size": 2, "enable_prefix_caching": False}
    assert engine_config(model, additional_config={"starling": {}}, **off).kv_transfer_config is None
    with pytest.raises(ValueError, match="star_replicas=2 is refused: replicas exchange"):
        engine_config(model, additional_config={"starling": {"star_replicas": 2}}, **off)
    with pytest.raises(ValueError, match="star_replicas=3 is refused: this server has 2"):
        engine_config(model, additional_config={"starling": {"star_replicas": 3}}, data_parallel_size=2)


def test_replicas_on_several_hosts_need_an_address(model, monkeypatch):
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    given = {"additional_config": {"starling": {}}, "data_parallel_size": 2}
    assert engine_config(model, **given).kv_transfer_config.kv_connector_extra_config[ONE_HOST]
    given |= {"data_parallel_size_local": 1, "data_parallel_address": "127.0.0.1"}
    with pytest.raises(
        ValueError, match="VLLM_HOST_IP=None is refused: VLLM_HOST_IP is not set, and replicas on several"
    ):
        engine_config(model, **given)
    monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.77")
    with pytest.raises(ValueError, match=r"no network device of this host has the address 192\.0\.2\.77"):
        engine_config(model, **given)
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    assert not engine_config(model, **given).kv_transfer_config.kv_connector_extra_config[ONE_HOST]
    monkeypatch.delenv("VLLM_HOST_IP")
    given["data_parallel_size_local"] = 0  # a front without replicas of its own
    assert engine_config(model, **given).kv_transfer_config is not None


def server_config(model, **arguments):
    return AsyncEngineArgs(model=str(model), enforce_eager=True, **arguments).create_engine_config()


FAULT_TOLERANCE = {
    "the flag": {"enable_fault_tolerance": True},
    "its options, which vLLM takes for the flag": {"fault_tolerance_config": {}},
}


@pytest.mark.parametrize("given", FAULT_TOLERANCE.values(), ids=FAULT_TOLERANCE)
def test_fault_tolerance_and_prompts_that_are_split_are_refused_together_at_the_start(model, monkeypatch, given):
    """vLLM takes it for mixtures of experts behind an external load balancer alone."""
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    given = given | {"data_parallel_size": 2, "data_parallel_rank": 0, "hf_overrides": {"num_experts": 4}}
    with pytest.raises(ValueError, match=r"star_replicas=2 is refused: .*--enable-fault-tolerance.*: auto or 1\."):
        server_config(model, additional_config={"starling": {"star_replicas": 2}}, **given)
    config = server_config(model, additional_config={"starling": {"star_replicas": "auto"}}, **given)
    assert config.parallel_config.enable_fault_tolerance and config.kv_transfer_config is None


@pytest.mark.parametrize(("executor", "one_host"), [("mp", True), ("uni", True), ("ray", False), (object, False)])
def test_processes_that_another_program_starts_may_be_on_other_hosts(executor, one_host):
    parallel = fake_config(parallel_config__distributed_executor_backend=executor).parallel_config
    parallel.data_parallel_size_local, parallel.nnodes = 1, 1
    assert is_one_host(parallel) == one_host
    parallel.nnodes = 2
    assert not is_one_host(parallel)


def test_over_how_many_replicas_kv_is_divided_by_default(model):
    def num_shards(number: int, **star) -> int:
        given = {"starling": {"star": "auto", "star_min_tokens": 256} | star}
        # In bfloat16 a processor with AMX has no shards.
        config = engine_config(model, additional_config=given, data_parallel_size=number, dtype="float32")
        return default_num_shards(config)

    assert (num_shards(1), num_shards(3)) == (1, 1)
    assert (num_shards(3, star_shards="on"), num_shards(3, star_shards="on", star_replicas=2)) == (3, 2)
    for refused, number, star in (
        ("this server has one replica", 1, {}),
        ("star_replicas=1 keeps", 2, {"star_replicas": 1}),
        ("star_overlap_size=", 2, {"star_overlap_size": 128, "star_block_size": 256}),
    ):
        with pytest.raises(ValueError, match=rf"star_shards='on' is refused: .*{refused}"):
            num_shards(number, star_shards="on", **star)


class TestGpuAttention:
    """The option ``gpu_attention``."""

    def test_it_selects_vllms_backend_for_others(self, model, monkeypatch):
        monkeypatch.setattr(activation, "current_platform", SimpleNamespace(device_type="cuda"))
        args = AsyncEngineArgs(model=str(model), additional_config={"starling": {"gpu_attention": "triton"}})
        before_engine_config(args)
        assert args.attention_backend is AttentionBackendEnum.CUSTOM

    def test_it_is_refused_on_a_cpu(self, model):
        with pytest.raises(OptionError, match=r"starling.gpu_attention='triton' is refused: the engine runs on cpu"):
            engine_config(model, additional_config={"starling": {"gpu_attention": "triton"}})

    @pytest.mark.parametrize(
        "given", [{"attention_backend": "FLASHINFER"}, {"attention_config": {"backend": "FLASHINFER"}}]
    )
    def test_a_backend_beside_it_is_refused(self, model, given):
        with pytest.raises(OptionError, match="--attention-backend FLASHINFER is given too"):
            engine_config(model, additional_config={"starling": {"gpu_attention": "xformers"}}, **given)


@pytest.mark.parametrize(
    ("device", "given", "share"), [("cuda", None, 0.92), ("cuda", 0.8, 0.8), ("cpu", None, None)], ids=str
)
def test_a_gpu_has_memory_left_for_star_steps(monkeypatch, device, given, share):
    """Since vLLM 0.34 no share means: all that the warm-up, which has no star step, leaves free."""
    monkeypatch.setattr(activation, "current_platform", SimpleNamespace(device_type=device))
    arguments = SimpleNamespace(gpu_memory_utilization=given)
    activation.leave_memory_for_steps(arguments)
    assert arguments.gpu_memory_utilization == share
