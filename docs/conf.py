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
    pages = {f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "CHANGELOG")}

    def here(link):
        target = link[1]
        return f"]({pages.get(target) or (target[5:] if target.startswith('docs/') else f'../{target}')})"

    source[0] = re.sub(r"\]\((?!https?:|#)([^)]+)\)", here, source[0])


def resolve(app, env, node, content):
    """Show a reference to what exists, but has no entry in the reference, as plain text; any other fails the build."""
    return content if node.get("refdomain") == "py" and exists(node["reftarget"].lstrip(".")) else None


def exists(name):
    """Tell whether a dotted name is a module or its attribute, from the top or from inside one of ours."""
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        pkgutil.resolve_name(name)
        return True
    for module in (builtins, *(m for key, m in list(sys.modules.items()) if f"{key}.".startswith("hybridzoo."))):
        with contextlib.suppress(AttributeError):
            operator.attrgetter(name)(module)
            return True
    return False


def setup(app):
    """Connect what is above."""
    app.connect("include-read", relink)
    app.connect("missing-reference", resolve)
