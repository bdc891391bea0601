"""What vLLM logs and users of Starling's commands do not see."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys

from vllm.triton_utils import importing

from starling.vllm_compat import logs


def test_only_that_triton_is_missing_is_hidden_and_only_from_its_logger():
    assert logs.MISSING_TRITON in inspect.getsource(importing), "vLLM says so no more"
    said = "import sys, logging, starling.engine_ext.serving.cli.main as _\n"
    said += "for name, text in zip(sys.argv[1::2], sys.argv[2::2]): logging.getLogger(name).warning(text)"
    texts = [logs.LOGGER, f"{logs.MISSING_TRITON} Disabling Triton.", logs.LOGGER, "else", "vllm", logs.MISSING_TRITON]
    done = subprocess.run([sys.executable, "-c", said, *texts], stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr.splitlines() == ["else", logs.MISSING_TRITON]


def test_hiding_it_twice_changes_nothing():
    logger = logging.getLogger(logs.LOGGER)
    logs.hide_missing_triton()
    before = list(logger.filters)
    logs.hide_missing_triton()
    assert logger.filters == before
    logger.removeFilter(logs.is_no_missing_triton)
