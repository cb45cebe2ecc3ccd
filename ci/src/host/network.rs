//! The emulated host's network interfaces: loopback, and a dummy one with an address and the default route, without
//! which passt and others believe that there is no network.
//!
//! Source: rtnetlink(7). The addresses are those for documentation (RFC 5737), so nothing real is hidden by them.

use std::fs::{self, File};
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

const ADDRESS: [u8; 4] = [192, 0, 2, 2];
const PREFIX_LENGTH: u8 = 24;
const GATEWAY: [u8; 4] = [192, 0, 2, 1];

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const LOCAL_ADDRESS: u16 = 2;
const ROUTE_GATEWAY: u16 = 5;
const INET: u8 = 2;
const UP: u32 = 1;
const MAIN_TABLE: u8 = 254;
const STATIC: u8 = 4;
const UNICAST: u8 = 1;

/// Brings both interfaces up.
pub(super) fn set_up() -> Result<()> {
    // Protocol 0 of netlink is rtnetlink.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let mut kernel = File::from(socket);
    let (lo, dummy) = (index("lo")?, index("dummy0")?);
    bring_up(&mut kernel, lo)?;
    let message = [&[INET, PREFIX_LENGTH, 0, 0], &dummy.to_le_bytes()[..], &attribute(LOCAL_ADDRESS, ADDRESS)];
    request(&mut kernel, NEW_ADDRESS, &message.concat())?;
    bring_up(&mut kernel, dummy)?;
    let route = [INET, 0, 0, 0, MAIN_TABLE, STATIC, 0, UNICAST, 0, 0, 0, 0];
    request(&mut kernel, NEW_ROUTE, &[&route[..], &attribute(ROUTE_GATEWAY, GATEWAY)].concat())
}

fn index(interface: &str) -> Result<u32> {
    let index = fs::read_to_string(format!("/sys/class/net/{interface}/ifindex"))
        .with_context(|| format!("There is no interface {interface}"))?;
    Ok(index.trim().parse()?)
}

fn bring_up(kernel: &mut File, interface: u32) -> Result<()> {
    let fields = [0, interface, UP, UP];
    request(kernel, NEW_LINK, &fields.map(u32::to_le_bytes).concat())
}

fn attribute(kind: u16, address: [u8; 4]) -> [u8; 8] {
    let ([length, _], kind, [a, b, c, d]) = (8u16.to_le_bytes(), kind.to_le_bytes(), address);
    [length, 0, kind[0], kind[1], a, b, c, d]
}

/// Sends one request and reads the answer to it.
fn request(kernel: &mut File, kind: u16, message: &[u8]) -> Result<()> {
    const REQUEST_ACK_CREATE: u16 = 0x405;
    const HEADER: usize = 16;
    let mut bytes = u32::try_from(HEADER + message.len())?.to_le_bytes().to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend(REQUEST_ACK_CREATE.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(message);
    kernel.write_all(&bytes)?;
    let mut answer = [0; 4096];
    let length = kernel.read(&mut answer)?;
    ensure!(length >= HEADER + 4, "The kernel's answer is cut off");
    let error = i32::from_le_bytes([answer[16], answer[17], answer[18], answer[19]]);
    ensure!(error == 0, "{}", std::io::Error::from_raw_os_error(-error));
    Ok(())
}
