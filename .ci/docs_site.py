"""A hook of mkdocs that names every source of the site by its path in the repository.

mkdocs names sources by their path under docs/, where a link to ../examples/demo.py leads nowhere. With these names the
links of all pages resolve as they do on GitHub. Pages of docs/ keep their short addresses: docs/grpc.md is at /grpc/.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


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
