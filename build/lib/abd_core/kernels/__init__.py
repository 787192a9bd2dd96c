"""Per-pixel and per-pair kernels with one public function each."""
