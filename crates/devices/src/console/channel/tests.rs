//! Descriptors that cannot be opened once more.

use super::*;

#[test]
fn a_shared_pipe_is_neither_changed_nor_waited_for() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut channel = Channel::new(File::from(OwnedFd::from(writer)), Kind::Shared(4096));
    let mut written = 0;
    let error = loop {
        match channel.write(&[7; 10_000]) {
            Ok(n) => written += n,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    assert_eq!(written, 64 << 10, "a pipe's whole size");
    reader.read_exact(&mut [0; 4096]).unwrap();
    assert_eq!(channel.write(&[7; 10_000]).unwrap(), 4096);

    let mut input = Channel::new(File::from(OwnedFd::from(reader)), Kind::Shared(1));
    let mut left = 64 << 10;
    let mut buffer = [0; 1000];
    while left > 0 {
        left -= input.read(&mut buffer).unwrap();
    }
    assert_eq!(input.read(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
    drop(channel);
    assert_eq!(input.read(&mut buffer).unwrap(), 0);
}

#[test]
fn what_is_inherited_is_used_in_the_way_that_fits() {
    let (reader, writer) = io::pipe().unwrap();
    let kind = |fd: BorrowedFd<'_>, direction| Channel::inherited(fd, direction).unwrap().kind;
    assert_eq!(kind(reader.as_fd(), Direction::Input), Kind::Own);
    assert_eq!(kind(writer.as_fd(), Direction::Output), Kind::Own);
    let (left, _right) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(kind(left.as_fd(), Direction::Input), Kind::Socket);
    assert_eq!(kind(tempfile::tempfile().unwrap().as_fd(), Direction::Output), Kind::Ready);
    assert_eq!(kind(File::open("/dev/null").unwrap().as_fd(), Direction::Input), Kind::Ready);
}
