//! The few system calls that neither std nor rustix offers in safe code, each made safe on its own.
#![allow(unsafe_code, reason = "system calls by libc; each is one call with its arguments checked by the types here")]

use std::io;
use std::mem::zeroed;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::Pid;

/// How much of a structure a call takes or gives back.
fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).expect("structures of the kernel are short")
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A child that has ended and is still to be waited for. Blocks until there is one.
///
/// # Errors
///
/// `ECHILD`: there are no children.
pub(crate) fn ended_child() -> io::Result<Option<Pid>> {
    // SAFETY: a siginfo_t is plain numbers, for which zero is a value.
    let mut info: libc::siginfo_t = unsafe { zeroed() };
    // SAFETY: `info` lives across the call.
    check(unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOWAIT) })?;
    // SAFETY: the call has filled in what is said of a child.
    Ok(Pid::from_raw(unsafe { info.si_pid() }))
}

/// Sends any signal, those without a name too, to a process group.
pub(crate) fn signal_group(group: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::kill(-group.as_raw_nonzero().get(), signal) }).map(drop)
}

/// Sends a signal to every process but this one. There being none is fine.
pub(crate) fn signal_all(signal: i32) {
    // SAFETY: no memory is passed.
    unsafe { libc::kill(-1, signal) };
}

/// Has the child call `prepare` before it becomes the program. `prepare` must do nothing but system calls: it runs in a
/// copy of one thread of this process, in which locks may be held for ever.
pub(crate) fn before_exec(command: &mut Command, prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: there is one caller, and what it passes allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
}

/// Has the signals that a parent can have ignored do what they do by themselves. A shell could not even handle them
/// otherwise.
pub(crate) fn heed_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGPIPE, libc::SIGTERM, libc::SIGCHLD] {
        // SAFETY: no handler is set, and every one of them can have its default.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// A vsock stream socket that nobody else has.
fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: an address is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).expect("the kernel numbers few families");
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

/// Connects to a port.
pub(crate) fn connect_vsock(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let (socket, address) = (vsock_socket()?, vsock_address(cid, port));
    let length = length_of::<libc::sockaddr_vm>();
    // SAFETY: the address lives across the call, and its length is right.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

/// Listens at a port.
pub(crate) fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    let (socket, address) = (vsock_socket()?, vsock_address(libc::VMADDR_CID_ANY, port));
    let length = length_of::<libc::sockaddr_vm>();
    // SAFETY: the address lives across the call, and its length is right.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::listen(socket.as_raw_fd(), 64) })?;
    Ok(socket)
}

/// The next connection to a listening socket, and the CID that it comes from.
pub(crate) fn accept_vsock(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, u32)> {
    let mut address = vsock_address(0, 0);
    let mut length = length_of::<libc::sockaddr_vm>();
    let to = (&raw mut address).cast();
    // SAFETY: the address and its length live across the call, and the length is right.
    let fd = check(unsafe { libc::accept4(listener.as_raw_fd(), to, &raw mut length, libc::SOCK_CLOEXEC) })?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    Ok((unsafe { OwnedFd::from_raw_fd(fd) }, address.svm_cid))
}

/// A socket for questions about the network.
fn any_socket(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks something about the network. `T` must be the structure that the request takes.
fn ask<T>(family: libc::c_int, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    let socket = any_socket(family)?;
    // SAFETY: the argument lives across the call, and the callers here pass what each request takes.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut *argument) }).map(drop)
}

/// An `ifreq` with nothing but the name of an interface.
fn interface(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an ifreq is plain numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    // The last byte stays the zero that ends it.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// An IPv4 address as ioctls take it.
fn ipv4(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: an address is plain numbers, for which zero is a value.
    let mut result: libc::sockaddr = unsafe { zeroed() };
    result.sa_family = libc::sa_family_t::try_from(libc::AF_INET).expect("the kernel numbers few families");
    // The port comes first.
    for (to, from) in result.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    result
}

fn ipv6(address: Ipv6Addr) -> libc::in6_addr {
    libc::in6_addr { s6_addr: address.octets() }
}

/// Sets an interface up.
pub(crate) fn set_up(name: &str) -> io::Result<()> {
    let mut request = interface(name)?;
    ask(libc::AF_INET, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: the call has set the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }) | libc::IFF_UP;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(libc::c_short::MAX);
    ask(libc::AF_INET, libc::SIOCSIFFLAGS, &mut request)
}

/// Gives an interface its IPv4 address, and the mask of its network.
pub(crate) fn set_ipv4(name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
    for (call, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
        let mut request = interface(name)?;
        request.ifr_ifru.ifru_addr = ipv4(value);
        ask(libc::AF_INET, call, &mut request)?;
    }
    Ok(())
}

/// Gives an interface one more IPv6 address.
pub(crate) fn add_ipv6(index: u32, address: Ipv6Addr, prefix: u8) -> io::Result<()> {
    let ifr6_ifindex = libc::c_int::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut request = libc::in6_ifreq { ifr6_addr: ipv6(address), ifr6_prefixlen: prefix.into(), ifr6_ifindex };
    ask(libc::AF_INET6, libc::SIOCSIFADDR, &mut request)
}

/// `struct rtentry`, `linux/route.h`.
#[repr(C)]
struct Route {
    pad1: libc::c_ulong,
    destination: libc::sockaddr,
    gateway: libc::sockaddr,
    mask: libc::sockaddr,
    flags: libc::c_ushort,
    pad2: libc::c_short,
    pad3: libc::c_ulong,
    pad4: *mut libc::c_void,
    metric: libc::c_short,
    device: *mut libc::c_char,
    mtu: libc::c_ulong,
    window: libc::c_ulong,
    round_trip: libc::c_ushort,
}

/// `struct in6_rtmsg`, `linux/ipv6_route.h`.
#[repr(C)]
struct Route6 {
    destination: libc::in6_addr,
    source: libc::in6_addr,
    gateway: libc::in6_addr,
    kind: u32,
    destination_length: u16,
    source_length: u16,
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    interface: libc::c_int,
}

/// Sends what has no other way to an IPv4 gateway.
pub(crate) fn route_ipv4(gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: a route is plain numbers and a pointer, for which zero is a value.
    let mut route: Route = unsafe { zeroed() };
    let nowhere = ipv4(Ipv4Addr::UNSPECIFIED);
    (route.destination, route.mask, route.gateway) = (nowhere, nowhere, ipv4(gateway));
    route.flags = libc::RTF_UP | libc::RTF_GATEWAY;
    ask(libc::AF_INET, libc::SIOCADDRT, &mut route)
}

/// Sends what has no other way to an IPv6 gateway at an interface.
pub(crate) fn route_ipv6(index: u32, gateway: Ipv6Addr) -> io::Result<()> {
    // SAFETY: a route is plain numbers, for which zero is a value.
    let mut route: Route6 = unsafe { zeroed() };
    route.gateway = ipv6(gateway);
    route.flags = (libc::RTF_UP | libc::RTF_GATEWAY).into();
    route.metric = 1;
    route.interface = libc::c_int::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
    ask(libc::AF_INET6, libc::SIOCADDRT, &mut route)
}

/// The number of an interface.
pub(crate) fn interface_index(name: &str) -> io::Result<u32> {
    let mut request = interface(name)?;
    ask(libc::AF_INET, libc::SIOCGIFINDEX, &mut request)?;
    // SAFETY: the call has set the number.
    u32::try_from(unsafe { request.ifr_ifru.ifru_ifindex }).map_err(|_| io::ErrorKind::InvalidData.into())
}
