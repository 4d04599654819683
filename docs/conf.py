import importlib
from importlib.metadata import version as version_of

import distdl_lite

project = "distdl_lite"
author = "the distdl_lite developers"
project_copyright = f"2026, {author}"
release = version = version_of("distdl_lite")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.doctest", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"

autosummary_generate = True
# Each object is documented once, where it is defined, also when a package re-exports it.
autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_typehints = "description"
napoleon_google_docstring = False
napoleon_use_ivar = True


def let_doctests_see_their_module(app, what, name, obj, options, lines):
    if what == "module":
        lines += ["", ".. testsetup::", "", f"   from {name} import *"]


def setup(app):
    app.connect("autodoc-process-docstring", let_doctests_see_their_module)
    # autosummary looks a module up as an attribute of its package, where the function `plan` hides the module `plan`.
    function = distdl_lite.plan
    distdl_lite.plan = importlib.import_module("distdl_lite.plan")
    app.connect("env-updated", lambda app, env: setattr(distdl_lite, "plan", function))
