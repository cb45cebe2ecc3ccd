//! cargo xtask: set-up, demo, tests, lint, benchmarks and the emulated host.
fn main() {}
