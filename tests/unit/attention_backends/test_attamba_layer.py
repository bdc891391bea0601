"""A layer of Attamba without an engine: the memory that a step takes, and what CUDA graphs need of it."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.attention.backend import AttentionCGSupport

from starling.attention_backends.attamba import attamba_backend, chunks, decode, mix, scan_kernel
from starling.attention_backends.attamba import attend_step as attention
from starling.attention_backends.attamba.attamba_backend import AttambaMetadataBuilder
from starling.attention_backends.kernels.triton import launch
from starling.attention_backends.kernels.triton import paged as triton_attention
from starling.engine_ext.models import attamba
from starling.engine_ext.models.attamba import OP, AttentiveSsm
from starling.engine_ext.models.configs import AttambaConfig
from tests.piecewise import graphs, in_pieces
from tests.unit.attention_backends.test_rows import batch_metadata
from tests.unit.device_copies import AsyncCopies


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors, allocated inside of the mode, that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and (key := leaf.untyped_storage()._cdata) not in given | self.seen:
                self.seen.add(key)
                self.now += leaf.untyped_storage().nbytes()
                weakref.finalize(leaf.untyped_storage(), self._free, key, leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.now -= num_bytes


@pytest.fixture
def one_rank(tmp_path):
    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
        initialize_model_parallel()
        yield config
    destroy_model_parallel()
    destroy_distributed_environment()


def make_layer(**sizes: int) -> AttentiveSsm:
    """The layer of a model of one layer, with random weights."""
    config = AttambaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, leading_tokens=5, ssm_heads=4, ssm_state_dim=16,
        **sizes,
    )  # fmt: skip
    layer = AttentiveSsm(config, 0, torch.float32, 700, "layer")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return layer


def bind_caches(layer: AttentiveSsm, config: VllmConfig, query_lens: list[int], seq_lens: list[int], device: str):
    """Allocate caches for a batch on a device; returns a function that builds the metadata of a step by cache."""
    builders = {}
    for cache in (layer.states, layer.window, layer.rows):
        spec = cache.spec
        columns = -(-max(seq_lens) // spec.block_size)
        values = spec.page_size_bytes // spec.dtype.itemsize
        width = spec.head_size + spec.head_size_v
        pages = torch.zeros(len(query_lens) * columns, values, device=device)
        cache.kv_cache = pages.as_strided((len(pages), 1, width), (values, width, 1))
        builders[cache.prefix] = AttambaMetadataBuilder(spec, [cache.prefix], config, torch.device(device)), columns

    def build(**fields):
        common = {name: batch_metadata(query_lens, seq_lens, columns) for name, (_, columns) in builders.items()}
        for one in common.values():
            for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
                setattr(one, name, getattr(one, name).to(device))
            one.__dict__.update(fields)
        return {name: builder.build(0, common[name]) for name, (builder, _) in builders.items()}, common

    return build


P, MOST_TOKENS, ROWS_OF_A_GROUP = 16, 256, 128


@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        ([256], [256]),
        ([256], [700]),
        ([2] * 128, [90] * 128),
        ([1] * 256, [P - 1] * 256),  # 15 rows of a chunk for each token
        ([193] + [1] * 63, [400, *range(20, 83)]),
        ([1] * 40, [200] * 40),
    ],
    ids=["prompt", "chunk", "pairs", "decode", "mixed", "few"],
)
def test_the_memory_profile_sees_the_peak_of_a_step(query_lens, seq_lens, one_rank, monkeypatch):
    """A run without metadata allocates at its peak at least what any step of as many tokens does, and little more.

    The mixers are wide, as in a large model, and the bytes of their intermediate results most of the peak.
    """
    for module in (attamba, mix):
        monkeypatch.setattr(module, "GROUP_ROWS", ROWS_OF_A_GROUP)
    for module in (attention, mix):
        monkeypatch.setattr(module, "built_op", lambda: None)  # torch takes more memory than the C++ ops
    layer = make_layer(token_chunk=P, ssm_inner=496)
    for module in layer.modules():
        if isinstance(module, LinearBase):
            module.quant_method.process_weights_after_loading(module)
    metadata, _ = bind_caches(layer, one_rank, query_lens, seq_lens, "cpu")()

    def peak(num_tokens: int, of_metadata) -> int:
        x = torch.randn(num_tokens, layer.wq.input_size)
        context = SimpleNamespace(attn_metadata=of_metadata, no_compile_layers={"layer": layer})
        with torch.inference_mode(), override_forward_context(context), LiveBytes() as live:
            out = layer(x)
        assert out.shape == x.shape
        assert out.isfinite().all()
        return live.peak

    step, profile = peak(sum(query_lens), metadata), peak(MOST_TOKENS, None)
    assert step <= profile
    assert profile <= 1.1 * step or len(query_lens) > 1


class Launches:
    """In place of a Triton kernel: notes the launches and runs nothing."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append(self.name)


@pytest.fixture
def launched(monkeypatch):
    """Names of the Triton kernels that were launched."""
    found: list[str] = []
    for module, names in (
        (decode, ("rows_kernel", "mix_kernel", "store_kernel", "join_kernel")),
        (scan_kernel, ("scan_kernel",)),
        (launch, ("paged_attention_kernel",)),
        (triton_attention, ("merge_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Launches(name, found))
    return found


DECODE = [
    "rows_kernel",
    "mix_kernel",
    "store_kernel",
    "paged_attention_kernel",
    "paged_attention_kernel",
    "join_kernel",
]


@pytest.mark.parametrize(
    ("query_lens", "kernels"),
    [([1, 1, 1], DECODE), ([1, 7, 1], ["scan_kernel", "paged_attention_kernel", "paged_attention_kernel"])],
    ids=["decode", "mixed"],
)
def test_a_step_on_a_gpu_waits_for_nothing(query_lens, kernels, one_rank, launched, monkeypatch):
    """A decode step reads no tensor of the host, because a CUDA graph would go on with that of its capture."""
    layer = make_layer(token_chunk=4, ssm_inner=32).to("meta")
    build = bind_caches(layer, one_rank, query_lens, [600, 7, 1], "meta")
    decodes = kernels is DECODE
    metadata, _ = build(**({"seq_lens_cpu_upper_bound": None} if decodes else {}))
    layer.mixers.project = lambda mixed: (mixed.new_empty(mixed.shape[1], 32),) * 2  # vLLM's layer, of a CPU
    count = sum(query_lens) + 2 * decodes  # with padding
    x, query = torch.empty(2, count, 32, device="meta")
    projected = torch.empty(count, layer.mixers.in_proj.output_size, device="meta")
    angles = attamba.angle_tables(*layer.rope, x.device)
    assert all(table.device.type == "meta" for table in angles)
    copies = AsyncCopies(monkeypatch, chunks, attamba_backend, allowed=not decodes)
    with override_forward_context(SimpleNamespace(attn_metadata=metadata)), copies:
        layer.attend(x, query, projected, torch.empty_like(query))
        once = copies.copies
        layer.attend(x, query, projected, torch.empty_like(query))
    assert launched == 2 * kernels
    assert copies.copies == once, "the plan is copied once for all layers"


def test_padding_gets_zeros(one_rank):
    """The rows of a compiled step behind its tokens."""
    layer = make_layer(token_chunk=4, ssm_inner=32)
    metadata, _ = bind_caches(layer, one_rank, [3, 1], [3, 9], "cpu")()
    layer.mixers.project = lambda mixed: (torch.zeros(mixed.shape[1], 32),) * 2
    x, query = torch.randn(2, 6, 32)
    out = torch.full_like(query, torch.nan)
    with override_forward_context(SimpleNamespace(attn_metadata=metadata)):
        layer.attend(x, query, torch.randn(6, layer.mixers.in_proj.output_size), out)
    assert out[:4].isfinite().all() and out[:4].any()
    assert not out[4:].any()


def test_a_captured_decode_step_reads_the_tensors_of_the_model_runner(one_rank):
    """The model runner writes the lengths and the block tables of each step to the same tensors."""
    layer = make_layer(token_chunk=4, ssm_inner=32)
    metadata, common = bind_caches(layer, one_rank, [1, 1, 1], [600, 7, 1], "meta")()
    for cache in (layer.states, layer.window, layer.rows):
        step, its = metadata[cache.prefix], common[cache.prefix]
        assert (step.num_tokens, step.decodes, step.tokens) == (3, True, None)
        assert step.seq_lens is its.seq_lens
        assert step.slot_mapping is its.slot_mapping
        assert step.query_start_loc is its.query_start_loc
        assert step.block_table is step.key_table is its.block_table_tensor
        builder = cache.get_attn_backend().get_builder_cls()
        assert builder.get_cudagraph_support(one_rank, cache.spec) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_the_piece_after_attention_reads_its_output_in_every_replay(monkeypatch):
    """Of a compiled layer, whose other pieces are CUDA graphs in mixed steps."""
    stand_in = SimpleNamespace(
        wq=lambda x: (2 * x, None),
        mixers=SimpleNamespace(in_proj=lambda x: (3 * x, None)),
        wo=lambda x: (5 * x, None),
        name="layer",
    )

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return AttentiveSsm.forward(stand_in, x + 1)

    layers = {"layer": SimpleNamespace(attend=lambda x, query, projected, out: out.copy_(x + query + projected))}
    layer, x, kept = in_pieces(Layer(), [OP], monkeypatch), torch.zeros(4, 8), []
    for step in range(3):
        x.fill_(step)
        kept.append(torch.ones(4, 8))  # what the op made would lie at another address
        with graphs(4, no_compile_layers=layers):
            assert layer(x).unique().tolist() == [5 * 6 * (step + 1)]
