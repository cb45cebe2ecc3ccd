//! What a fleet needs of this host, looked at before anything starts.

use std::env;
use std::ffi::OsString;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use fleet::spec::Fleet;

/// Programs, and the Debian packages that they are in.
const PROGRAMS: [(&str, &str); 4] =
    [("ip", "iproute2"), ("nft", "nftables"), ("dnsmasq", "dnsmasq-base"), ("pasta", "passt")];

/// What of it is not there, each with the cure.
pub(crate) fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    for (program, package) in PROGRAMS {
        if !in_path(program) {
            missing.push(format!("there is no {program} in PATH: install it (`apt install {package}`)"));
        }
    }
    if let Err(error) = vmm() {
        missing.push(format!("{error:#}"));
    }
    missing
}

/// Which published ports somebody else has.
pub(crate) fn taken(fleet: &Fleet) -> Vec<String> {
    let mut taken = Vec::new();
    for (name, service) in &fleet.services {
        for publish in &service.publish {
            let address = (publish.address, publish.host);
            let bound = if publish.udp { UdpSocket::bind(address).err() } else { TcpListener::bind(address).err() };
            if let Some(error) = bound {
                let port = publish.host;
                let cure = match error.kind() {
                    std::io::ErrorKind::PermissionDenied => {
                        format!(
                            "say one from 1024 on, or allow it: `sysctl net.ipv4.ip_unprivileged_port_start={port}`"
                        )
                    }
                    _ => format!(
                        "see `ss -lntup` for who has it, or publish another: \"{}:{}\"",
                        port.saturating_add(1),
                        publish.guest
                    ),
                };
                taken.push(format!(
                    "service {name}: port {port} at {} is not to be had ({error}): {cure}",
                    publish.address
                ));
            }
        }
    }
    taken
}

/// `vmm` itself: beside this program, or in `PATH`.
pub(crate) fn vmm() -> anyhow::Result<PathBuf> {
    let own = env::current_exe().context("cannot tell which program this is")?;
    let beside = own.parent().unwrap_or(Path::new("/")).join("vmm");
    if beside.exists() {
        return Ok(beside);
    }
    find("vmm").with_context(|| format!("there is no vmm in {} nor in PATH: install it there", beside.display()))
}

fn in_path(program: &str) -> bool {
    find(program).is_some()
}

fn find(program: &str) -> Option<PathBuf> {
    env::split_paths(&path()).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// `PATH`, with the folders of system programs, which an ordinary user's may leave out.
pub(crate) fn path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin:/usr/bin:/bin");
    path
}
