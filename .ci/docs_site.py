"""A hook of mkdocs: it names the sources of the site by their paths in the repository, and finds lists that are none.

mkdocs names sources by their path under docs/, where a link to ../examples/demo.py leads nowhere. With these names the
links of all pages resolve as they do on GitHub. Pages of docs/ keep their short addresses: docs/grpc.md is at /grpc/.

GitHub shows a list in places where Python-Markdown shows running text: without an empty line before it, and behind a
table or a list in an item that is indented by fewer than four spaces. A page with such text is a warning, which ends a
strict build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks.docs_site")
CODE = re.compile(r"<pre.*?</pre>", re.DOTALL)
RUNNING_TEXT = re.compile(r"^ *(?:<p>(?:[-*+]|\d+[.)])|<li>(?:<p>)?\||<p>\||[-*+]|1[.)]|\|) .*$", re.MULTILINE)
"""A line of HTML that begins with the mark of a list or of a table."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Rename the files of docs/, and add the files that ``extra.repository_files`` names."""
    root = Path(config.config_file_path).parent

    def source(path: str, dest: str | None) -> File:
        return File(path, str(root), config.site_dir, config.use_directory_urls, dest_uri=dest)

    docs = Path(config.docs_dir).relative_to(root)
    named = [
        source(f"{docs}/{file.src_uri}", file.dest_uri) if file.src_dir == config.docs_dir else file for file in files
    ]
    for pattern in config.extra["repository_files"]:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            # mkdocs would make README.md the index.html of its folder, which is the first page's place at the root.
            named.append(source(name, "readme/index.html" if name == "README.md" else None))
    return Files(named)


def running_text(html: str) -> list[str]:
    """Return the lines of a rendered page that were meant as items of a list or rows of a table."""
    return RUNNING_TEXT.findall(CODE.sub("", html))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Warn of lists and tables that became running text."""
    for line in running_text(html):
        logger.warning("%s: not a list or a table but running text: %s", page.file.src_uri, line[:120])
