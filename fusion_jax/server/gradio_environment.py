"""Hides GRADIO_* variables from Gradio, which reads them when imported; import this module first.

Those variables could open folders, share the page through a tunnel or serve other routes. Gradio's files are kept in a
folder of this process alone, not in /tmp/gradio, which all users of a machine share.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

for _name in [name for name in os.environ if name.startswith("GRADIO_")]:
    del os.environ[_name]
FOLDER = Path(tempfile.mkdtemp(prefix="fusion_jax-page-")).resolve()  # mode 0700
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
os.environ |= {
    "GRADIO_TEMP_DIR": str(FOLDER),
    "GRADIO_ANALYTICS_ENABLED": "False",
    # By default Gradio keeps 10,000 events and, after each, makes a table of all of them that is not shown here.
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(1 << 60),
}
