#!/usr/bin/env bash
# Install lrnn and what it needs into a container image of Ubuntu 24.04. Dockerfile and lrnn.def run this, so that both
# images hold the same:   docker/install.sh system, then docker/install.sh lrnn in the folder of lrnn's source
set -euo pipefail

case ${1:-} in
    system) # Python 3.12 and the compiler that Triton needs at run time
        export DEBIAN_FRONTEND=noninteractive
        apt-get update
        apt-get install --yes --no-install-recommends python3 python3-dev python3-venv build-essential git
        rm -rf /var/lib/apt/lists/*
        python3 -m venv "$VIRTUAL_ENV"
        ;;
    lrnn)
        # PyTorch from PyPI includes CUDA. DeepSpeed is installed from source, without its compiled extensions.
        # The ptxas of Triton before 3.9 can miscompile kernels for Hopper, and the fastest kernels need ptxas 13.3.
        DS_BUILD_OPS=0 "$VIRTUAL_ENV/bin/pip" install --no-cache-dir -c constraints.txt -e ".[eval]" \
            "nvidia-cuda-nvcc>=13.3,<14"
        test -x "$TRITON_PTXAS_PATH"
        ;;
    *)
        echo "usage: docker/install.sh system|lrnn" >&2
        exit 2
        ;;
esac
