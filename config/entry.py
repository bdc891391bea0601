"""The `starling` entry of vLLM's additional_config: all options of a server, parsed once, and their presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starling.config.library import LibraryOptions, parse_library
from starling.config.parsing import OptionError, meant
from starling.config.quality import parse_quality_sizes
from starling.config.scheduling import (
    REPLICAS,
    SCHEDULING,
    ReplicaOptions,
    SchedulingOptions,
    parse_replicas,
    parse_scheduling,
)
from starling.config.star import (
    FIELD_OF,
    QUALITY_SIZES,
    SHARED,
    STAR_ADAPTER,
    STAR_HEADS,
    STAR_LIBRARY,
    STAR_RETENTION,
    StarOptions,
    parse_options,
)

PRESET = "preset"


@dataclass(frozen=True)
class Preset:
    """A set of options; a user's other options replace single ones.

    Attributes:
        meaning: description for the help.
        entry: values of the `starling` entry.
        cpu_page: vLLM's --block-size on CPUs, where its default of 128 tokens is too large, or None for vLLM's default.
    """

    meaning: str
    entry: Mapping[str, Any]
    cpu_page: int | None = None


PRESETS = {
    "long": Preset(
        "long prompts of any kind: star blocks from 16,384 tokens on",
        {"star": "auto", "star_min_tokens": 16384},
    ),
    "rag": Preset(
        "prompts of many documents, each a message of a chat: their cached KV is used in any order",
        {"star": "auto", "star_min_tokens": 1024, "star_segments": "auto"},
        cpu_page=32,
    ),
    "agents": Preset(
        "long sessions whose files and tool results change, beside short chats: cached messages are used behind an "
        "edit, and long prompts leave room for others",
        {"star": "auto", "star_min_tokens": 4096, "star_segments": "auto"},
        cpu_page=32,
    ),
}


def preset_of(entry: Mapping[str, Any], name: str) -> Preset | None:
    """Return the preset that an entry names, or None if it names none.

    Args:
        name: name of the option, for messages.

    Raises:
        OptionError: there is no such preset.
    """
    value = entry.get(PRESET)
    if value is None:
        return None
    if not isinstance(value, str) or value not in PRESETS:
        hint = meant(value, PRESETS) if isinstance(value, str) else ""
        raise OptionError(name, value, f"there is no such preset{hint}", ", ".join(PRESETS))
    return PRESETS[value]


def with_preset(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an entry with the options of its preset below its own (raises OptionError: there is no such preset)."""
    preset = preset_of(entry, name)
    own = {key: value for key, value in entry.items() if key != PRESET}
    return {**({} if preset is None else preset.entry), **own}


ENTRY = "starling"
CPU_ATTENTION, GPU_ATTENTION, CACHE_SALT, LIVE_PAGE = "cpu_attention", "gpu_attention", "cache_salt", "live_page"

CHOICES = {  # the first is the default
    # The faster attention op for CPUs, or always vLLM's.
    CPU_ATTENTION: ("auto", "vllm"),
    # The kernels of all layers on GPUs: the backend that vLLM chooses, or one of Starling's.
    GPU_ATTENTION: ("vllm", "triton", "xformers"),
    # Which requests share cached pages: those with the same salt or none, as in vLLM; each needs a salt; by API key.
    CACHE_SALT: ("request", "required", "api-key"),
    # Whether the HTTP server has a page that shows the requests.
    LIVE_PAGE: ("off", "on"),
}
SECTIONS = {SCHEDULING: '{"fairness": "on", ...}', REPLICAS: '{"timeout": 30}'}
NAMES = (PRESET, *FIELD_OF, QUALITY_SIZES, STAR_HEADS, STAR_LIBRARY, *SECTIONS, *CHOICES)


@dataclass(frozen=True)
class StarlingConfig:
    """The parsed entry; the fields behind ``replicas`` are values of CHOICES.

    Attributes:
        quality_sizes: word of ``star_quality`` -> the number of star blocks, 1 for dense; or None for the study's.
        star_heads: file with the scores of the model's KV heads, or None for those that Starling knows of the model.
        star_adapter: folder of the adapter for prompts with a star plan, or None if there is none.
        library: place of pages beside the engine's memory, or None if there is none.
    """

    star: StarOptions = field(default_factory=lambda: parse_options({}))
    quality_sizes: Mapping[str, int] | None = None
    star_heads: str | None = None
    star_adapter: str | None = None
    library: LibraryOptions | None = None
    scheduling: SchedulingOptions = field(default_factory=SchedulingOptions)
    replicas: ReplicaOptions = field(default_factory=ReplicaOptions)
    cpu_attention: str = CHOICES[CPU_ATTENTION][0]
    gpu_attention: str = CHOICES[GPU_ATTENTION][0]
    cache_salt: str = CHOICES[CACHE_SALT][0]
    live_page: str = CHOICES[LIVE_PAGE][0]

    @property
    def reads_all_caches(self) -> bool:
        """Return whether Starling's CPU attention has to read the cache of each full-attention layer.

        Where it has to, vLLM lays out keys for vectors on a processor with AMX tiles too, since the op does not read
        keys that are laid out for tiles.
        """
        return self.star.says_where_documents_start or self.star.shards == "on"


class Entries(Mapping[str, Any]):
    """An engine's additional_config with the `starling` entry alone, which vLLM's key of compiled code does not have.

    vLLM hashes a dict as it is, and asks anything else for ``compute_hash``, since 0.34 for ``compile_factors``
    (vllm/config/vllm.py). No compiled code depends on Starling's options: attention is an op that is not compiled, and
    vLLM hashes backend and LoRA by themselves. So another option does not cost a compilation of minutes.
    """

    def __init__(self, additional_config: Mapping[str, Any]) -> None:
        self._entries = dict(additional_config)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(self._entries)

    def compute_hash(self) -> str:
        """Return the same for all options: Starling is activated."""
        return ENTRY

    def compile_factors(self) -> dict[str, Any]:
        """Return the same for all options, as ``compute_hash``."""
        return {ENTRY: True}


MAX_PARSED = 8
_parsed: dict[str, StarlingConfig] = {}  # by the text of the entry: the last MAX_PARSED ones


def config_of(vllm_config: Any) -> StarlingConfig | None:
    """Return the options in an engine's configuration, or None if Starling is not activated (raises OptionError)."""
    return parse_config(vllm_config.additional_config)


def parse_config(additional_config: Any) -> StarlingConfig | None:
    """Parse the entry; return None where Starling is not activated.

    Raises:
        OptionError: the entry holds something that is not allowed.
    """
    if not isinstance(additional_config, Mapping) or ENTRY not in additional_config:
        return None
    entry = additional_config[ENTRY]
    text = repr(entry)
    if text not in _parsed:
        parsed = _parse(entry)
        if len(_parsed) >= MAX_PARSED:
            del _parsed[next(iter(_parsed))]
        _parsed[text] = parsed
    return _parsed[text]


def _parse(entry: Any) -> StarlingConfig:
    if not isinstance(entry, Mapping):
        raise OptionError(ENTRY, entry, "it must be an object", '{"star": "auto"}')
    for key, value in entry.items():
        if key not in NAMES:
            reason = f"there is no such option{meant(str(key), NAMES)}"
            raise OptionError(f"{ENTRY}.{key}", value, reason, ", ".join(NAMES))
    if STAR_RETENTION in entry:
        reason = "it is an option of a request, and not of the server"
        raise OptionError(f"{ENTRY}.{STAR_RETENTION}", entry[STAR_RETENTION], reason, f"{SCHEDULING}.retained_share")
    entry = with_preset(entry, f"{ENTRY}.{PRESET}")
    for section, example in SECTIONS.items():
        if not isinstance(value := entry.get(section, {}), Mapping):
            raise OptionError(f"{ENTRY}.{section}", value, "it must be an object", example)
    chosen = {name: entry.get(name, values[0]) for name, values in CHOICES.items()}
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            reason = f"there is no such choice{meant(str(value), CHOICES[name])}"
            raise OptionError(f"{ENTRY}.{name}", value, reason, " or ".join(CHOICES[name]))
    for name, of in ((STAR_HEADS, "file"), (STAR_ADAPTER, "folder")):
        path = entry.get(name)
        if path is not None and (not isinstance(path, str) or not path):
            raise OptionError(f"{ENTRY}.{name}", path, "it must be a path", f"the path of a {of}, or nothing")
    library = entry.get(STAR_LIBRARY)
    sizes = entry.get(QUALITY_SIZES)
    return StarlingConfig(
        quality_sizes=None if sizes is None else parse_quality_sizes(sizes, f"{ENTRY}.{QUALITY_SIZES}"),
        star_heads=entry.get(STAR_HEADS),
        star_adapter=entry.get(STAR_ADAPTER),
        library=None if library is None else parse_library(library, f"{ENTRY}.{STAR_LIBRARY}"),
        star=parse_options({key: value for key, value in entry.items() if key in SHARED}),
        scheduling=parse_scheduling(entry.get(SCHEDULING, {}), f"{ENTRY}.{SCHEDULING}."),
        replicas=parse_replicas(entry.get(REPLICAS, {}), f"{ENTRY}.{REPLICAS}."),
        **chosen,
    )


ADMIN_KEY_ENV = "STARLING_ADMIN_KEY"
"""Name of the environment variable that holds the operator's key."""

PLUGINS = "VLLM_PLUGINS"
RUST_FRONT = "VLLM_USE_RUST_FRONTEND"


def refuse_missing_plugin(environ: Mapping[str, str]) -> None:
    """Refuse an environment that keeps Starling out of vLLM's processes (raises OptionError)."""
    plugins = environ.get(PLUGINS)
    if plugins is not None and ENTRY not in plugins.split(","):
        reason = "it keeps Starling out of vLLM's processes"
        raise OptionError(PLUGINS, plugins, reason, f"a list with `{ENTRY}`, or unset")


def refuse_rust_front(environ: Mapping[str, str]) -> None:
    """Refuse vLLM's Rust front, which would not call Starling (raises OptionError)."""
    if (value := environ.get(RUST_FRONT, "0")) not in ("", "0"):
        raise OptionError(RUST_FRONT, value, "the Rust front reads no star options", "0, or unset")


LIVE_PATH, LIVE_DATA = "/starling/live", "/starling/live.json"
