//! `cargo xtask`: everything the project does to itself, one verb each.
//!
//! | verb | module | what it does |
//! |---|---|---|
//! | `setup` | [`setup`] | installs the Debian packages that the other verbs need |
//! | `host` | [`host`] | runs a command in the emulated host, where KVM is real |
//! | `test` | [`test`] | the gate: unit tests, then integration tests where KVM is real |
//! | `demo` | [`demo`] | boots a stock Debian kernel in the VMM, up to a shell |
//! | `assets` | [`assets`] | makes the kernels and initramfs files that the tests boot |
//! | `bench` | [`bench`] | the figures that are recorded in `resources/` |
//! | `lint` | [`lint`] | formatting, clippy, size limits and the invariants |
//! | `kernel` | [`kernel`] | builds the small guest kernel |
//! | `image` | [`image`] | makes a Debian image, and the file that boots it |
//!
//! Beneath them: [`assets`] (kernels and initramfs files, made on demand), [`apt`] (where kernels come from), [`cache`]
//! (where all that is kept, outside the clone), [`build`] (what Cargo builds),
//! [`place`] (here or in the emulated host) and [`progress`]. What runs in guests is in `ci/guest`.

use std::process::ExitCode;

use clap::Parser;

mod apt;
mod assets;
mod bench;
mod build;
mod cache;
mod database;
mod demo;
mod host;
mod image;
mod kernel;
mod lint;
mod place;
mod progress;
mod setup;
mod test;

/// Sets up, shows, tests and measures the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Xtask {
    /// Install the Debian packages that are missing.
    Setup,
    /// Boot a stock Debian kernel in vmm, up to its shell.
    Demo,
    /// Run all tests but the long ones.
    Test(test::Args),
    /// Make the kernels and initramfs files that the integration tests boot, and print where they are.
    Assets,
    /// Run a command in the emulated host, where KVM is real.
    Host(host::Args),
    /// Check formatting, lints, size limits and the design's invariants.
    Lint(lint::Args),
    /// Measure the figures that the project promises.
    Bench(bench::Args),
    /// Build the small guest kernel from Debian's kernel source.
    Kernel(kernel::Args),
    /// Make a Debian image, and beside it its kernel, its initrd and a debian.toml that boots them.
    Image(image::Args),
}

fn main() -> ExitCode {
    if std::env::args_os().next().is_some_and(|name| name.as_encoded_bytes().ends_with(host::inside::INIT.as_bytes())) {
        host::inside::main();
    }
    let result = match Xtask::parse() {
        Xtask::Setup => setup::run().map(|()| ExitCode::SUCCESS),
        Xtask::Demo => demo::run().map(ExitCode::from),
        Xtask::Test(args) => test::run(&args).map(|passed| if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Xtask::Assets => setup::with_servers().and_then(|()| assets::directory(true)).map(|directory| {
            println!("{}", directory.display());
            ExitCode::SUCCESS
        }),
        Xtask::Host(args) => host::run(&args).map(ExitCode::from),
        Xtask::Lint(args) => lint::run(&args).map(|()| ExitCode::SUCCESS),
        Xtask::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Xtask::Kernel(args) => kernel::run(args).map(|()| ExitCode::SUCCESS),
        Xtask::Image(args) => image::run(&args).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
