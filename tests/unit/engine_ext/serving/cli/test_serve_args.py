"""The command line of `starling serve`, and of `starling`."""

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from starling.config.entry import refuse_missing_plugin, refuse_rust_front
from starling.config.parsing import OptionError
from starling.config.star import FIELDS, SHARED, StarOptions, flat_name
from starling.engine_ext.serving.cli import main as cli
from starling.engine_ext.serving.cli.serve_args import (
    FLAGS,
    activate,
    admin_options,
    make_parser,
    parse,
    refuse_open_plaintext,
)
from starling.engine_ext.serving.grpc import auth
from starling.engine_ext.serving.grpc.server_options import is_loopback
from starling.vllm_compat import versions

MODEL = "some/model"


@pytest.fixture(scope="module")
def parser():
    return make_parser()


@pytest.fixture
def parse_fast(monkeypatch, parser):
    """Parse with one parser for the module: building vLLM's takes seconds."""
    monkeypatch.setattr("starling.engine_ext.serving.cli.serve_args.make_parser", lambda: parser)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    return lambda *argv: parse([MODEL, *argv])


def test_always_activated(parse_fast):
    args, port = parse_fast()
    assert (args.model_tag, args.additional_config, port) == (MODEL, {"starling": {}}, None)


@pytest.mark.parametrize("field", [field for field in SHARED.values() if field != "mode"])
def test_every_option_has_a_flag(parse_fast, field):
    words = {"shards": "on", "segments": "auto", "dense_heads": 0.25, "quality": "fast"}
    given, expected = (words[field], words[field]) if field in words else ("96", 96)
    args, _ = parse_fast(f"--{flat_name(field).replace('_', '-')}", str(given))
    assert args.additional_config["starling"] == {flat_name(field): expected}
    assert not any(flat_name(name) in args for name in FIELDS), "vLLM should not see our flags"


def test_mode_flag(parse_fast):
    args, _ = parse_fast("--star", "Auto", "--star_block_size", "n/8", "--star-min-tokens=16K")
    assert args.additional_config["starling"] == {
        "star": "auto",
        "star_block_size": "n/8",
        "star_min_tokens": 16_384,
    }


def test_a_newcomer_has_few_flags_to_learn(parser):
    groups = parser._subparsers._group_actions[0].choices["serve"]._action_groups
    own = {group.title: len(group._group_actions) for group in groups if (group.title or "").startswith("Starling")}
    assert own.keys() == {"Starling", "Starling advanced"}
    assert own["Starling"] <= 8, "--grpc-port is vLLM's, and does something else here"
    assert sum(own.values()) <= 25


def test_flags_join_additional_config(parse_fast):
    args, _ = parse_fast("--additional-config", '{"starling":{"star":"on"},"other":1}', "--star-anchor-size=64")
    assert args.additional_config == {"starling": {"star": "on", "star_anchor_size": 64}, "other": 1}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--star-block-size", "12q"], ["star_block_size='12q'", "whole number", "(str)"]),
        (["--star-block-size", "1.5"], ["star_block_size='1.5'"]),
        (["--star-query-tokens", "-1"], ["star_query_tokens='-1'", "0 or more"]),
        (["--star-block-size", "0"], ["star_block_size='0'", "1 or more"]),
        (["--star", "perhaps"], ["star='perhaps'", "off, on, auto"]),
        (
            ["--additional-config", '{"starling":{"star_blok":1}}'],
            ["starling.star_blok", "no such option", "did you mean star_"],
        ),
        (["--additional-config", '{"starling":{"moon":{}}}'], ["starling.moon", "no such option"]),
        (["--additional-config", '{"starling":[]}'], ["starling=[]", "object"]),
        (
            ["--additional-config", '{"starling":{"star_block_size":512}}', "--star-block-size", "1024"],
            ["--star-block-size=1024", "block_size=512"],
        ),
    ],
)
def test_bad_star_options_are_refused_by_name(parse_fast, argv, says):
    with pytest.raises(OptionError) as refused:
        parse_fast(*argv)
    assert all(part in str(refused.value) for part in says), refused.value


def test_a_flag_may_repeat_what_additional_config_says():
    config = {"starling": {"star_block_size": 512}}
    assert activate(config, {"star_block_size": "512"}) == config
    sizes = {"fast": "n/16", "balanced": "n/8", "careful": "dense"}
    config = {"starling": {"star_quality_sizes": sizes}}
    assert activate(config, {"star_quality_sizes": "careful=dense,fast=n/16,balanced=n/8"}) == config
    with pytest.raises(OptionError, match="--star-quality-sizes"):
        activate(config, {"star_quality_sizes": "careful=dense,fast=n/16,balanced=n/4"})


def test_activate_leaves_its_argument_alone():
    config = {"starling": {}}
    activate(config, {"star_block_size": 512})
    assert config == {"starling": {}}


def test_vllm_does_not_see_the_grpc_port(parse_fast):
    args, port = parse_fast("--grpc-port", "0", "--data-parallel-size", "2")
    assert (args.grpc_port, port, args.api_server_count) == (None, 0, None)


@pytest.mark.parametrize(
    ("argv", "servers"),
    [
        (["--data-parallel-size", "2"], 1),  # vLLM would start two
        (["--data-parallel-size", "2", "--api-server-count", "3"], 3),
        (["--data-parallel-size", "2", "--headless"], None),
        ([], None),
    ],
)
def test_one_api_server_serves_all_replicas(parse_fast, argv, servers):
    assert parse_fast(*argv)[0].api_server_count == servers


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--headless"], "--headless"),
        (["--grpc"], "--grpc serves"),
        (["--api-server-count", "2"], "--api-server-count"),
        (["--port", "7001"], "--port is the same"),
        (["--data-parallel-multi-port-external-lb"], "--data-parallel-multi-port-external-lb"),
    ],
)
def test_options_that_exclude_grpc(parse_fast, argv, says):
    with pytest.raises(ValueError, match=says):
        parse_fast("--grpc-port", "7001", *argv)
    parse_fast(*argv)  # without gRPC vLLM decides


def test_grpc_port_may_be_https_port_on_a_unix_socket(parse_fast):
    assert parse_fast("--grpc-port", "7001", "--port", "7001", "--uds", "/tmp/x")[1] == 7001


def test_help_shows_starlings_meaning_of_grpc_port(parser):
    serve = parser._subparsers._group_actions[0].choices["serve"]
    (action,) = [action for action in serve._actions if action.dest == "grpc_port"]
    assert "starling.v1" in action.help
    assert "Rust" not in action.help


def test_help_shows_one_default_and_names_options_as_requests_do(parser):
    serve = parser._subparsers._group_actions[0].choices["serve"]
    groups = {group.title: group for group in serve._action_groups}
    actions = [action for name in ("Starling", "Starling advanced") for action in groups[name]._group_actions]
    formatter = serve._get_formatter()
    bare = {name for name in FIELDS if "_" in name}
    for action in actions:
        shown = formatter._expand_help(action)
        assert shown.lower().count("default: ") <= 1, action.dest
        assert "(default: None)" not in shown, action.dest
        assert bare.isdisjoint(re.findall(r"\w+", shown)), action.dest


@pytest.mark.parametrize("field", SHARED.values())
def test_help_shows_description_and_default(parser, field):
    serve = parser._subparsers._group_actions[0].choices["serve"]
    (action,) = [action for action in serve._actions if action.dest == flat_name(field)]
    default = getattr(StarOptions(), field)
    assert FIELDS[field].description in action.help
    assert default is None or f"(default: {default})" in action.help


@pytest.mark.parametrize(
    ("environ", "fine"),
    [
        ({}, True),
        ({"VLLM_PLUGINS": "a,starling"}, True),
        ({"VLLM_PLUGINS": "a"}, False),
        ({"VLLM_PLUGINS": ""}, False),
        ({"VLLM_USE_RUST_FRONTEND": "0"}, True),
        ({"VLLM_USE_RUST_FRONTEND": "1"}, False),
    ],
    ids=str,
)
def test_environments_that_would_bypass_starling(environ, fine):
    def refuse():
        refuse_missing_plugin(environ)
        refuse_rust_front(environ)

    if fine:
        refuse()
        return
    with pytest.raises(OptionError, match=next(iter(environ))):
        refuse()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("my.host", False),
    ],
)
def test_is_loopback(host, loopback):
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("keys", "metadata", "admitted"),
    [
        ([], [], True),
        (["k"], [], False),
        (["k"], [("authorization", "Bearer k")], True),
        (["k"], [("authorization", "bearer k")], True),
        (["a", "k"], [("x", "y"), ("authorization", "Bearer k")], True),
        (["k"], [("authorization", "Bearer kk")], False),
        (["k"], [("authorization", "Basic k")], False),
        (["k"], [("authorization", "k")], False),
        (["k"], [("authorization", "Bearer ")], False),
    ],
)
def test_api_key(keys, metadata, admitted):
    refusal = auth.AuthInterceptor(keys).refusal(metadata)
    assert (refusal is None) == admitted


@pytest.mark.parametrize(
    ("reqs", "authority", "says"), [(1, "ca.pem", "not supported over gRPC"), (2, None, "--ssl-ca-certs")]
)
def test_tls_that_grpc_does_not_support(reqs, authority, says):
    args = Namespace(ssl_certfile="c", ssl_keyfile="k", ssl_cert_reqs=reqs, ssl_ca_certs=authority)
    with pytest.raises(ValueError, match=says):
        auth.server_credentials(args)


def test_help_loads_no_vllm():
    code = (
        "import sys; from starling.engine_ext.serving.cli import main as cli\n"
        "try: cli.main(['--help'])\n"
        "finally: print('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "\n  serve      start the OpenAI server" in done.stdout
    assert "\n  setup-cpu  install vLLM" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("starling 0.")


def test_a_broken_setup_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(versions, "problem", lambda: "vLLM 9.9 is outside the supported range")
    assert cli.main(["serve", MODEL]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (
        "",
        "starling serve: error: vLLM 9.9 is outside the supported range\n",
    )


def test_console_script_refuses_a_bad_option_before_anything_heavy():
    starling = Path(sys.executable).with_name("starling")
    done = subprocess.run(
        [starling, "serve", MODEL, "--star-block-size", "x"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("starling serve: error: star_block_size='x' is refused")


TLS = ["--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem"]
OPEN = ["--host", "0.0.0.0"]


def open_plaintext(parse_fast, *options: str) -> None:
    args, grpc_port = parse_fast(*options)
    admin = admin_options(args, grpc_port, {})
    refuse_open_plaintext(args, grpc_port, admin)
    assert "grpc_plaintext" not in args, "vLLM has no such argument"


@pytest.mark.parametrize(
    "options",
    [
        [],
        OPEN,
        ["--grpc-port", "0"],
        ["--grpc-port", "0", "--host", "localhost"],
        ["--grpc-port", "0", *OPEN, *TLS],
        ["--grpc-port", "0", *OPEN, "--grpc-plaintext"],
        ["--grpc-port", "0", "--grpc-plaintext"],
    ],
    ids=" ".join,
)
def test_grpc_in_the_clear_stays_on_loopback(parse_fast, options):
    open_plaintext(parse_fast, *options)


ADMIN = ["--grpc-admin-port", "0", "--grpc-admin-host", "0.0.0.0", "--grpc-admin-key", "k"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--grpc-port", "7", *OPEN], ["--grpc-port 7", "0.0.0.0", "--ssl-certfile", "--grpc-plaintext"]),
        (["--grpc-port", "7", "--host", "::"], ["--grpc-port 7", "::"]),
        (["--grpc-port", "7", *ADMIN], ["--grpc-admin-port 0", "0.0.0.0", "--grpc-plaintext"]),
        (["--grpc-plaintext"], ["--grpc-plaintext", "--grpc-port"]),
        (["--grpc-port", "7", "--grpc-plaintext", *TLS], ["--grpc-plaintext", "--ssl-certfile"]),
    ],
    ids=" ".join,
)
def test_grpc_in_the_clear_elsewhere_is_refused(parse_fast, options, says):
    with pytest.raises(ValueError) as refused:
        open_plaintext(parse_fast, *options)
    assert all(part in str(refused.value) for part in says), refused.value


def test_library_flag(parse_fast):
    args, _ = parse_fast("--star-library", "/pages:1GiB")
    assert args.additional_config["starling"] == {"star_library": "/pages:1GiB"}
    assert "star_library" not in args, "vLLM should not see our flags"
    same = '{"starling": {"star_library": "/pages"}}'
    args, _ = parse_fast("--star-library", "/pages", "--additional-config", same)
    assert args.additional_config["starling"] == {"star_library": "/pages"}
    with pytest.raises(OptionError, match="--additional-config says star_library='/pages'"):
        parse_fast("--star-library", "/other", "--additional-config", same)
    with pytest.raises(OptionError, match=r"starling\.cpu_attention='fast' is refused"):
        parse_fast("--additional-config", '{"starling": {"cpu_attention": "fast"}}')


def test_live_page_flag(parse_fast):
    args, _ = parse_fast("--live-page", "on")
    assert args.additional_config["starling"] == {"live_page": "on"}
    assert "live_page" not in args, "vLLM should not see our flags"


def test_what_is_rarely_set_is_in_additional_config_alone(parse_fast):
    given = '{"starling": {"scheduler": {"star_block_reuse": "off"}, "replicas": {"timeout": "soon"}}}'
    with pytest.raises(
        OptionError, match=r"starling\.replicas\.timeout='soon' is refused: it must be a number above 0"
    ):
        parse_fast("--additional-config", given)
    given = given.replace('"soon"', "7.5")
    args, _ = parse_fast("--scheduler-fairness", "off", "--additional-config", given)
    assert args.additional_config["starling"] == {
        "scheduler": {"star_block_reuse": "off", "fairness": "off"},
        "replicas": {"timeout": 7.5},
    }
    assert "scheduler_fairness" not in args, "vLLM should not see our flags"
    same = '{"starling": {"scheduler": {"fairness": "on"}}}'
    with pytest.raises(OptionError, match=r"--scheduler-fairness='off'.*says fairness='on'"):
        parse_fast("--scheduler-fairness", "off", "--additional-config", same)


def test_flags_have_different_names():
    assert len({flag.dest for flag in FLAGS}) == len(FLAGS)
