//! A driver of the device, and the host's side of its sockets.

use super::super::packet::{HEADER, HOST, Header, NOTHING, STREAM, op};
use super::super::{Vsock, VsockSpec};
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;
use virtio::testing::{self, DEADLINE, Driver, MmioRegisters};

pub(super) const RX: u16 = 0;
pub(super) const TX: u16 = 1;
pub(super) const EVENT: u16 = 2;
pub(super) const CID: u64 = 3;
/// What Linux gives for a packet.
pub(super) const ROOM: usize = 4096;
pub(super) const GUEST_PORT: u32 = 1000;

/// A guest with a device, and the folder of the sockets.
pub(super) struct Rig {
    pub(super) driver: Driver<MmioRegisters<Vsock>>,
    pub(super) folder: TempDir,
}

/// One end of a connection in the guest, which keeps its account of credit.
#[derive(Clone, Copy)]
pub(super) struct End {
    pub(super) host: u32,
    pub(super) guest: u32,
    pub(super) sent: u32,
    pub(super) received: u32,
    pub(super) room: u32,
}

impl Rig {
    /// A guest with 128 buffers for packets.
    pub(super) fn new() -> Self {
        let mut rig = Self::without_buffers();
        for _ in 0..128 {
            rig.driver.add(RX, &[], &[ROOM]);
        }
        rig.driver.kick(RX);
        rig
    }

    pub(super) fn without_buffers() -> Self {
        let folder = TempDir::new().unwrap();
        let spec = VsockSpec { path: folder.path().join("v"), ..VsockSpec::default() };
        let mut driver = testing::mmio(Vsock::new(&spec).unwrap());
        driver.boot(u64::MAX);
        Self { driver, folder }
    }

    pub(super) fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("v_{port}"))).unwrap()
    }

    /// A client that asks for a port of the guest's.
    pub(super) fn client(&self, line: &[u8]) -> UnixStream {
        let mut client = UnixStream::connect(self.folder.path().join("v")).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        client.write_all(line).unwrap();
        client
    }

    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header { len: u32::try_from(data.len()).unwrap(), ..header }.encode();
        let all: &[&[u8]] = if data.is_empty() { &[&header] } else { &[&header, data] };
        self.driver.send(TX, all, &[]);
        self.driver.collect(TX);
    }

    /// The next packet, whose buffer is given back.
    pub(super) fn next(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.collect(RX);
        self.driver.send(RX, &[], &[ROOM]);
        let header = Header::decode(used.data[..HEADER].try_into().unwrap());
        assert_eq!(header.len as usize, used.data.len() - HEADER);
        (header, used.data[HEADER..].to_vec())
    }

    /// The next packet, which must be this operation for this end, and carry no data.
    pub(super) fn expect(&mut self, op: u16, end: &mut End) -> Header {
        let (header, data) = self.next();
        assert_eq!((header.op, data.len()), (op, 0), "{header:?}");
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST, CID, STREAM));
        assert_eq!((header.src_port, header.dst_port), (end.host, end.guest));
        if op != op::RST {
            end.room = header.buf_alloc - (end.sent - header.fwd_cnt);
        }
        header
    }

    /// Data for this end; what else comes for it in between is room.
    pub(super) fn hear(&mut self, end: &mut End, length: usize) -> Vec<u8> {
        let mut heard = Vec::new();
        while heard.len() < length {
            let (header, data) = self.next();
            assert_eq!((header.src_port, header.dst_port), (end.host, end.guest));
            assert!(matches!(header.op, op::RW | op::CREDIT_UPDATE), "{header:?}");
            end.received += header.len;
            end.room = header.buf_alloc - (end.sent - header.fwd_cnt);
            heard.extend(data);
        }
        heard
    }

    pub(super) fn say(&mut self, end: &mut End, data: &[u8]) {
        end.sent += u32::try_from(data.len()).unwrap();
        self.send(end.packet(op::RW), data);
    }

    /// A connection that the guest makes to port 52, where somebody listens.
    pub(super) fn open(&mut self, listener: &UnixListener) -> (End, UnixStream) {
        self.open_from(listener, GUEST_PORT)
    }

    pub(super) fn open_from(&mut self, listener: &UnixListener, guest: u32) -> (End, UnixStream) {
        let mut end = End { guest, ..End::new(52) };
        self.send(end.packet(op::REQUEST), &[]);
        self.expect(op::RESPONSE, &mut end);
        let host = listener.accept().unwrap().0;
        host.set_read_timeout(Some(DEADLINE)).unwrap();
        (end, host)
    }

    /// What the guest has got for other connections than `probe` until now. An answer for that one comes after it.
    pub(super) fn others(&mut self, probe: &End) -> Vec<Header> {
        self.send(probe.packet(op::CREDIT_REQUEST), &[]);
        let mut others = Vec::new();
        loop {
            let (header, _) = self.next();
            if header.dst_port == probe.guest {
                return others;
            }
            others.push(header);
        }
    }

    /// Both sides can still reach each other by a new connection, and nothing else is on its way.
    pub(super) fn assert_works(&mut self) {
        let listener = self.listen(99);
        let mut end = End { guest: 4242, ..End::new(99) };
        self.send(end.packet(op::REQUEST), &[]);
        self.expect(op::RESPONSE, &mut end);
        let mut host = listener.accept().unwrap().0;
        host.write_all(b"ping").unwrap();
        assert_eq!(self.hear(&mut end, 4), b"ping");
        self.say(&mut end, b"pong");
        let mut heard = [0; 4];
        host.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"pong");
        self.send(Header { flags: NOTHING, ..end.packet(op::SHUTDOWN) }, &[]);
        self.expect(op::RST, &mut end);
    }
}

impl End {
    pub(super) fn new(host: u32) -> Self {
        Self { host, guest: GUEST_PORT, sent: 0, received: 0, room: 0 }
    }

    /// A packet from this end, which has read all that it got.
    pub(super) fn packet(&self, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST,
            src_port: self.guest,
            dst_port: self.host,
            kind: STREAM,
            op,
            buf_alloc: 256 << 10,
            fwd_cnt: self.received,
            ..Header::default()
        }
    }
}
