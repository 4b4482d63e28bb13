"""Models without PyTorch: written as ONNX (package.py), answering by ONNX Runtime (runner.py)."""
