//! In a guest, sends back all that comes through a connection to or from the host (`AF_VSOCK`), and ends with it:
//! `vsock-echo listen PORT` for the host's next connection, `vsock-echo connect PORT` for one of its own.
//!
//! `xtask` has rustc compile it as it stands, without Cargo. System calls: vsock(7).

#![allow(unsafe_code, reason = "the standard library knows no sockets of this kind")]

use std::fs::File;
use std::io::{self, Error, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};

const FAMILY: i32 = 40;
const STREAM: i32 = 1;
const ANYBODY: u32 = u32::MAX;
const HOST: u32 = 2;
const NO_MORE_WRITES: i32 = 1;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn bind(socket: i32, address: *const Address, length: u32) -> i32;
    fn listen(socket: i32, backlog: i32) -> i32;
    fn accept(socket: i32, address: *mut Address, length: *mut u32) -> i32;
    fn connect(socket: i32, address: *const Address, length: u32) -> i32;
    fn shutdown(socket: i32, how: i32) -> i32;
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, verb, port] = arguments.as_slice() else { return Err(Error::other("say listen PORT or connect PORT")) };
    let port = port.parse().map_err(Error::other)?;
    let address = |cid| Address { family: FAMILY as u16, reserved: 0, port, cid, zero: [0; 4] };
    const LENGTH: u32 = size_of::<Address>() as u32;
    // SAFETY: numbers go in and a descriptor comes out, which is nobody else's.
    let socket = unsafe { File::from_raw_fd(result(socket(FAMILY, STREAM, 0))?) };
    let mut stream = if verb == "listen" {
        // SAFETY: the address is alive, and its length is right.
        result(unsafe { bind(socket.as_raw_fd(), &address(ANYBODY), LENGTH) })?;
        // SAFETY: numbers only.
        result(unsafe { listen(socket.as_raw_fd(), 1) })?;
        println!("listening");
        // SAFETY: the peer's address is not asked for, and the new descriptor is nobody else's.
        unsafe { File::from_raw_fd(result(accept(socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()))?) }
    } else {
        // SAFETY: the address is alive, and its length is right.
        result(unsafe { connect(socket.as_raw_fd(), &address(HOST), LENGTH) })?;
        socket
    };
    let mut buffer = vec![0; 256 << 10];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            // SAFETY: numbers only.
            result(unsafe { shutdown(stream.as_raw_fd(), NO_MORE_WRITES) })?;
            return Ok(());
        }
        stream.write_all(&buffer[..count])?;
    }
}

fn result(returned: i32) -> io::Result<i32> {
    if returned < 0 { Err(Error::last_os_error()) } else { Ok(returned) }
}
