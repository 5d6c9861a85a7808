//! `containerd-shim-ringfence-v2`: becomes containerd's own shim, with `ringfence-runtime` as its runtime.

fn main() -> std::process::ExitCode {
    ringfence_shim_wrapper::shim::main()
}
