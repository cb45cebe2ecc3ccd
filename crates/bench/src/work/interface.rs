//! The network card of a machine, which has nobody else to set it up.

#![allow(unsafe_code, reason = "interfaces are set up by ioctls on a structure that holds a union")]

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;

use rustix::net::{AddressFamily, SocketType, socket};

/// Gives the first card this address, in the network that its class says, and sets it and the loop-back interface up.
pub(super) fn set_up(address: Ipv4Addr) -> io::Result<()> {
    switch_on(&mut named(OsStr::new("lo")))?;
    let mut names: Vec<_> = fs::read_dir("/sys/class/net")?.flatten().map(|entry| entry.file_name()).collect();
    names.retain(|name| name != "lo");
    names.sort();
    let name = names.first().ok_or_else(|| io::Error::other("the machine has no network card"))?;
    let mut request = named(name);
    let family = libc::sa_family_t::try_from(libc::AF_INET).map_err(io::Error::other)?;
    let octets = address.octets().map(u8::cast_signed);
    let mut data = [0; 14];
    data[2..6].copy_from_slice(&octets);
    request.ifr_ifru.ifru_addr = libc::sockaddr { sa_family: family, sa_data: data };
    ask(libc::SIOCSIFADDR, &mut request)?;
    switch_on(&mut request)
}

fn named(name: &OsStr) -> libc::ifreq {
    // SAFETY: all zeros are a valid structure: an empty name and a union of numbers.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let characters = name.as_encoded_bytes().iter().map(|byte| byte.cast_signed());
    // The last one stays the zero that ends the name.
    let places = request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1);
    places.zip(characters).for_each(|(place, character)| *place = character);
    request
}

fn switch_on(request: &mut libc::ifreq) -> io::Result<()> {
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    ask(libc::SIOCSIFFLAGS, request)
}

fn ask(call: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: both calls read a `struct ifreq` of which the part they need is set.
    match unsafe { libc::ioctl(socket.as_raw_fd(), call, std::ptr::from_mut(request)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
