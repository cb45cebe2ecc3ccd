//! A process in a switch's place, as a thread: it maps the memory that it is given, takes each frame of queue 1, and
//! gives it back by queue 0. It knows nothing of the front end, and its rings are read by hand.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;

use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

/// VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_NET_F_MRG_RXBUF.
pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 15;

/// Answers to one request, eight bytes.
pub(crate) fn answer(request: u32, value: u64) -> Vec<u8> {
    let mut answer = Vec::new();
    for field in [request, 5, 8] {
        answer.extend(field.to_le_bytes());
    }
    answer.extend(value.to_le_bytes());
    answer
}

/// A request as it came: its number, its body, and the file that came with it.
pub(crate) fn receive(stream: &UnixStream) -> Option<(u32, u32, Vec<u8>, Option<File>)> {
    let mut header = [0; 12];
    let (count, file) = stream.recv_with_fd(&mut header).ok()?;
    if count != header.len() {
        return None;
    }
    let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; field(8) as usize];
    (&mut &*stream).read_exact(&mut body).ok()?;
    Some((field(0), field(4), body, file))
}

#[derive(Default)]
struct Vring {
    size: u16,
    descriptors: u64,
    used: u64,
    available: u64,
    position: u16,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
}

/// A switch at the other end of one connection.
pub(crate) struct Switch {
    stream: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Switch {
    /// Lets the next one in who connects to `path`.
    pub(crate) fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        let own = stream.try_clone().unwrap();
        Self { stream, thread: Some(std::thread::spawn(move || serve(&own))) }
    }

    /// Listens, and accepts in the background, because who connects waits for answers.
    pub(crate) fn listen(path: &Path) -> (UnixListener, JoinHandle<Self>) {
        let listener = UnixListener::bind(path).unwrap();
        let own = listener.try_clone().unwrap();
        (listener, std::thread::spawn(move || Self::accept(&own)))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn serve(stream: &UnixStream) {
    let (mut memory, mut rings) = (None, [Vring::default(), Vring::default()]);
    let epoll = Epoll::new().unwrap();
    let add = |fd, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token)).unwrap();
    add(stream.as_raw_fd(), 9);
    loop {
        let mut events = [EpollEvent::default()];
        epoll.wait(-1, &mut events).unwrap();
        if events[0].data() != 9 {
            let ring = usize::try_from(events[0].data()).unwrap();
            let _ = rings[ring].kick.as_ref().unwrap().read(&mut [0; 8]);
            if rings.iter().all(|ring| ring.enabled && ring.kick.is_some()) {
                echo(memory.as_ref().unwrap(), &mut rings);
            }
            continue;
        }
        let Some((request, flags, body, file)) = receive(stream) else { return };
        let long = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
        let ring = || usize::try_from(long(0) & 0xff).unwrap();
        let short = || u16::try_from(long(0) >> 32).unwrap();
        let mut result = 0;
        match request {
            1 => result = FEATURES,
            15 => result = 1 << 3 | 1 << 63,
            2 => assert_eq!(long(0) & !FEATURES, 0),
            16 => assert_eq!(long(0), 1 << 3),
            3 => {}
            5 => {
                assert_eq!(long(0), 1, "one region");
                let file = FileOffset::new(file.unwrap(), long(32));
                let range = (GuestAddress(long(8)), usize::try_from(long(16)).unwrap(), Some(file));
                assert_eq!(long(8), long(24), "addresses are the guest's");
                memory = Some(GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap());
            }
            8 => rings[ring()].size = short(),
            10 => rings[ring()].position = short(),
            9 => {
                let ring = &mut rings[ring()];
                (ring.descriptors, ring.used, ring.available) = (long(8), long(16), long(24));
            }
            11 => {
                let ring = &mut rings[ring()];
                if let Some(kick) = ring.kick.take() {
                    epoll.ctl(ControlOperation::Delete, kick.as_raw_fd(), EpollEvent::default()).unwrap();
                }
                result = long(0) | u64::from(ring.position) << 32;
            }
            12 => {
                add(file.as_ref().unwrap().as_raw_fd(), long(0));
                rings[ring()].kick = file;
            }
            13 => rings[ring()].call = file,
            18 => rings[ring()].enabled = short() == 1,
            other => panic!("request {other}"),
        }
        if flags & 8 != 0 || matches!(request, 1 | 11 | 15) {
            std::io::Write::write_all(&mut &*stream, &answer(request, result)).unwrap();
        }
    }
}

/// Gives each frame back, as far as there is room.
fn echo(memory: &GuestMemoryMmap, rings: &mut [Vring; 2]) {
    while rings.iter().all(|ring| ring.waits(memory)) {
        let (head, from) = rings[1].take(memory);
        let mut frame = Vec::new();
        for (address, length) in from {
            let mut piece = vec![0; length];
            memory.read_slice(&mut piece, address).unwrap();
            frame.extend(piece);
        }
        rings[1].give(memory, head, 0);
        let (head, to) = rings[0].take(memory);
        let (address, room) = to[0];
        assert!(frame.len() <= room, "the test's buffers hold a frame");
        memory.write_slice(&frame, address).unwrap();
        rings[0].give(memory, head, u32::try_from(frame.len()).unwrap());
    }
}

impl Vring {
    fn waits(&self, memory: &GuestMemoryMmap) -> bool {
        memory.read_obj::<u16>(GuestAddress(self.available + 2)).unwrap() != self.position
    }

    fn take(&mut self, memory: &GuestMemoryMmap) -> (u16, Vec<(GuestAddress, usize)>) {
        let slot = self.available + 4 + 2 * u64::from(self.position % self.size);
        let head: u16 = memory.read_obj(GuestAddress(slot)).unwrap();
        self.position = self.position.wrapping_add(1);
        let (mut index, mut pieces) = (head, Vec::new());
        loop {
            let at = self.descriptors + 16 * u64::from(index);
            let [low, high, length, flags]: [u32; 4] = memory.read_obj(GuestAddress(at)).unwrap();
            pieces.push((GuestAddress(u64::from(low) | u64::from(high) << 32), length as usize));
            if flags & 1 == 0 {
                return (head, pieces);
            }
            index = u16::try_from(flags >> 16).unwrap();
        }
    }

    fn give(&self, memory: &GuestMemoryMmap, head: u16, written: u32) {
        let index: u16 = memory.read_obj(GuestAddress(self.used + 2)).unwrap();
        let slot = self.used + 4 + 8 * u64::from(index % self.size);
        memory.write_obj([u32::from(head), written], GuestAddress(slot)).unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        memory.write_obj(index.wrapping_add(1), GuestAddress(self.used + 2)).unwrap();
        std::io::Write::write_all(&mut self.call.as_ref().unwrap(), &1u64.to_ne_bytes()).unwrap();
    }
}
