"""What pyproject.toml cannot say: the documentation inside the package, and a description without links to files.

The description is the README. On a package index its relative links would lead nowhere, so there they are plain text.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PAGES = ("docs/*.md", "docs/results/*.md")
PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?://)([^)\s]+)\)")


class BuildWithPages(build_py):
    """Copy the documentation into `lrnn/docs`: the pages, whose links to each other then work, and what they show."""

    def run(self) -> None:
        if self.editable_mode:  # the package is then used where it is, beside `docs`
            return super().run()
        shutil.rmtree(self.build_lib, ignore_errors=True)  # with what an earlier version had, and this one has not
        super().run()
        for page in self._pages():
            target = Path(self.build_lib, "lrnn", page)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / page, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the files that the build writes, the pages among them."""
        return [*super().get_outputs(include_bytecode), *(str(Path(self.build_lib, "lrnn", p)) for p in self._pages())]

    def _pages(self) -> list[Path]:
        pages = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
        pictures = {page.parent / link for page in pages for link in PICTURE.findall(page.read_text(encoding="utf-8"))}
        return [path.relative_to(ROOT) for path in [*pages, *sorted(pictures)]]


def description() -> str:
    """Return the README with links to files of the repository as plain text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", text)


setup(
    cmdclass={"build_py": BuildWithPages},
    long_description=description(),
    long_description_content_type="text/markdown",
)
