"""Configuration of the documentation site; `make docs` builds it."""

project = "lrnn"
author = "The lrnn developers"
extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["results/*/*"]  # data beside the pages, tables among it that are shown on GitHub only
html_theme = "furo"
html_title = "lrnn"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
