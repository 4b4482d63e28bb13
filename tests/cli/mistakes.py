"""Runs commands one after the other where PyTorch and transformers cannot be imported: lists of words come as JSON on
standard input, [exit code, what was printed] of each goes out."""

import contextlib
import io
import json
import sys
import traceback


class Refused:
    """Finds these modules first, and none of them."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"{name} was imported")


sys.meta_path.insert(0, Refused())  # type: ignore[arg-type]


def said(words: list[str]) -> tuple[int, str]:
    from openm6.cli import main

    sys.argv, out, code = ["openm6", *words], io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except Exception:
            return 3, traceback.format_exc()
    return code, out.getvalue()


if __name__ == "__main__":
    print(json.dumps([said(words) for words in json.load(sys.stdin)]))
