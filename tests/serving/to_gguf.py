"""Run by a Python that has what llama.cpp's converter wants: ``to_gguf.py TOOL CONVERTER PRE OUT FOLDER…``; runs our tool on each folder, in
one process, and prints for each a line of JSON: the file, or an error. PRE ``""``: the tool finds the name."""

import importlib.util
import json
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    tool, converter, pre, out, *folders = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("tool", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    named = ["--pre", pre] if pre else []
    for folder in folders:
        file = Path(out) / (Path(folder).name + ".gguf")
        try:
            module.main([converter, folder, *named, "--outfile", str(file), "--outtype", "f32"])
            found = {"file": str(file)}
        except BaseException:
            found = {"error": traceback.format_exc()}
        print("RESULT " + json.dumps({"folder": folder, **found}), flush=True)
