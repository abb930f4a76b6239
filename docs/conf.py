"""Sphinx's settings for the site that docs/build.py makes."""
import configparser
from pathlib import Path

settings = configparser.ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, copyright, release = settings["title"], settings["author"], settings["copyright"], settings["version"]
extensions = ["myst_nb", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are checked by nbdev_test; their pictures are kept in them
nb_merge_streams = True
nb_ipywidgets_js = {}  # they would come from the network
nb_code_prompt_show, nb_code_prompt_hide = "Source", "Source"
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

html_theme = "pydata_sphinx_theme"
html_title = settings["title"]
html_sidebars = {"**": ["globaltoc.html"]}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False
html_theme_options = {
    "navbar_align": "left", "navbar_center": [], "navbar_end": ["theme-switcher"], "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2, "footer_start": ["copyright"], "footer_end": [], "pygments_light_style": "friendly", "navigation_with_keys": False,
}
mathjax_path = "tex-svg.js"
