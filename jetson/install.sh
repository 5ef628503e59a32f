#!/bin/sh
# Install the vila-edge runtime for one user: sh install.sh [WHEEL]
set -eu

TARGET="${VILA_EDGE_HOME:-$HOME/.local/share/vila-edge}"
WHEEL="${1:-$(ls vila_edge-*.whl 2>/dev/null | tail -n 1)}"

if [ ! -f "$WHEEL" ]; then
    echo "error: no wheel of vila-edge here" >&2
    echo "hint: copy one beside this script, or name it: sh install.sh vila_edge-0.1.0-py3-none-any.whl" >&2
    exit 3
fi
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $(python3 --version) is too old, vila-edge needs 3.10 or newer (JetPack 6 or 7)" >&2
    exit 1
fi
# JetPack's own packages (TensorRT, say) are seen through --system-site-packages.
if ! python3 -m venv --system-site-packages "$TARGET"; then
    echo "hint: sudo apt install python3-venv" >&2
    exit 1
fi
"$TARGET/bin/pip" install --quiet --upgrade "$WHEEL"
"$TARGET/bin/vila-edge" --version
echo "Start it with $TARGET/bin/vila-edge, or put $TARGET/bin on your PATH."
