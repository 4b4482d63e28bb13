"""Models without PyTorch, exported as ONNX (package.py) and run by ONNX Runtime (runner.py); edge devices that defer
uncertain requests to a server (cascade.py)."""
