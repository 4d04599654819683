import importlib
import inspect
import re
from importlib.metadata import version as version_of

import distdl_lite

project = "distdl_lite"
author = "the distdl_lite developers"
project_copyright = f"2026, {author}"
release = version = version_of("distdl_lite")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "matplotlib.sphinxext.plot_directive",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery", "sg_execution_times.rst"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"{project} {release}"

autosummary_generate = True
# Pages of modules show what is defined there, not what is imported.
autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
# The pages of the gallery are run when the manual is built, on ranks that are threads.
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "generated/gallery",
    "filename_pattern": r"\.py",
    "abort_on_example_error": True,
    "parallel": 2,
    "download_all_examples": False,
    "within_subsection_order": "FileNameSortKey",
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
}
# Pictures are drawn when the manual is built, from the code that stands above them.
plot_include_source = True
plot_html_show_source_link = plot_html_show_formats = False
plot_formats = ["svg"]
napoleon_google_docstring = False
# Names that share a line of a docstring share it here too.
napoleon_use_param = False
napoleon_custom_sections = [("Attributes", "params_style")]


def let_doctests_see_their_module(app, what, name, obj, options, lines):
    if any(line.lstrip().startswith(">>>") for line in lines):
        module = getattr(obj, "__module__", name)
        lines += ["", ".. testsetup::", "", f"   from {module} import *"]


def let_classes_have_the_words_of_their_base(app, what, name, obj, options, lines):
    if what == "class" and not lines:
        lines += inspect.getdoc(obj).splitlines()


def leave_out_what_torch_documents(app, what, name, obj, skip, options):
    return skip or str(getattr(obj, "__module__", "")).startswith("torch")


def begin_with_the_picture(app, docname, source):
    folder, _, page = docname.rpartition("/")
    if folder == "generated/gallery" and page != "index":
        picture = (
            rf"\1\n\n.. image:: images/sphx_glr_{page}_001.png\n   :class: sphx-glr-single-img\n   :alt: The result\n"
        )
        source[0] = re.sub(r"(?m)^(=+)$", picture, source[0], count=1)


def setup(app):
    app.connect("source-read", begin_with_the_picture)
    app.connect("autodoc-skip-member", leave_out_what_torch_documents)
    app.connect("autodoc-process-docstring", let_classes_have_the_words_of_their_base, priority=1)  # before napoleon
    app.connect("autodoc-process-docstring", let_doctests_see_their_module)
    # autosummary looks a module up as an attribute of its package, where the function `plan` hides the module `plan`.
    function = distdl_lite.plan
    distdl_lite.plan = importlib.import_module("distdl_lite.plan")
    app.connect("env-updated", lambda app, env: setattr(distdl_lite, "plan", function))
