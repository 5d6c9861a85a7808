//! `ringfence-proxy`.

fn main() {}
