//! `ringfence-runtime`: an OCI runtime that joins containers to their proxies and becomes runc or crun.

fn main() -> std::process::ExitCode {
    ringfence_shim_wrapper::runtime::main()
}
