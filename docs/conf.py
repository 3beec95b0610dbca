"""The site of `make docs`: these pages as they stand, and a reference from the docstrings. Whatever leads nowhere fails the build."""

import builtins
import contextlib
import operator
import pkgutil
import re
import sys

import hybridzoo

project = "hybridzoo"
release = hybridzoo.__version__
copyright = "the hybridzoo authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_title = f"hybridzoo {release}"

myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes and units
napoleon_use_rtype = False  # "Returns: One per block: ..." names no type
nitpicky = True


def relink(app, path, docname, source):
    """Let the links of a page that is included from the root start from here."""
    pages = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

    def here(link):
        return f"]({pages.get(link[1]) or f'../{link[1]}'.replace('../docs/', '')})"

    source[0] = re.sub(r"\]\((?!https?:|#)([^)]+)\)", here, source[0])


def resolve(app, env, node, content):
    """Show a reference to what exists, but has no entry in the reference, as plain text; any other fails the build."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].lstrip(".")
    ours = (module for key, module in list(sys.modules.items()) if f"{key}.".startswith("hybridzoo."))
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        pkgutil.resolve_name(name)
        return content
    for module in (builtins, *ours):
        with contextlib.suppress(AttributeError):
            operator.attrgetter(name)(module)
            return content
    return None


def skip(app, what, name, obj, skipped, options):
    """Leave out the fields of named tuples where they are no more than numbers: their class describes them."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app):
    """Connect what is above."""
    app.connect("autodoc-skip-member", skip)
    app.connect("include-read", relink)
    app.connect("missing-reference", resolve)
