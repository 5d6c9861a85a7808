//! What `ringfence-runtime` and `containerd-shim-ringfence-v2` do before they become the real runtime and shim.
