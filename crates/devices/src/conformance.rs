//! What every device has to withstand, over both transports: resets at any point, features that it did not offer, reads
//! and writes of its configuration wherever and as wide as the guest likes, rings and requests that no driver would send.
//! After each of them the device has stopped with NEEDS_RESET or goes on, and after the next reset it works. And it is
//! saved in the midst of its work, which goes on in another device; no state that was made up does any harm.
//!
//! The devices are made from [`Devices`] itself, so one that is not listed here fails the suite. What the queues and the
//! status machine do with all this is proved once, in the crate `virtio`; here it is about what each device makes of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use memory::{FileRegion, Ram};
use serde_json::Value;
use tempfile::TempDir;
use virtio::testing::{self, Descriptor, Driver, INDIRECT, NEXT, RAM, Registers, Ring, Saved, WRITE};
use virtio::transport::{Access, Control, Half, Handle, Reg, status};
use virtio::{Kind, VirtioDevice, features};

use crate::console::{Console, SerialSpec};
use crate::net::tests::in_namespace_of;
use crate::{Attach, Devices, Transport};

#[test]
fn every_device_withstands_every_driver_on_mmio() {
    in_namespace_of("conformance::every_device_withstands_every_driver_on_mmio", || check_all(Transport::Mmio));
}

#[test]
fn every_device_withstands_every_driver_on_pci() {
    in_namespace_of("conformance::every_device_withstands_every_driver_on_pci", || check_all(Transport::Pci));
}

/// Each device with all that it can have.
fn check_all(transport: Transport) {
    let folder = tempfile::tempdir().unwrap();
    let devices = all_devices(&folder);
    let Devices { disk, pmem, net, rng, vsock, share, balloon } = &devices;
    let lengths = [disk.len(), pmem.len(), net.len(), rng.len(), vsock.len(), share.len(), balloon.len()];
    assert!(lengths.iter().all(|length| *length > 0), "a device is missing in all_devices");
    let mut suite = Suite { transport, saved: BTreeMap::new(), checked: 0 };
    // The second round begins with what the first has saved.
    for round in 1..=2 {
        devices.attach(None, None, &mut suite).unwrap();
        let console = Console::open_hvc(&SerialSpec::Off, Box::new(|| ())).unwrap();
        suite.attach("console".into(), None, console.attach_hvc()).unwrap();
        assert_eq!(suite.checked, round * (lengths.iter().sum::<usize>() + 1));
    }
}

fn all_devices(folder: &TempDir) -> Devices {
    fn list<T: serde::de::DeserializeOwned>(texts: &[String]) -> Vec<T> {
        texts.iter().map(|text| kv::from_str(text).unwrap()).collect()
    }
    let image = |name: &str| {
        let path = folder.path().join(name);
        File::create(&path).unwrap().set_len(4 << 20).unwrap();
        path.display().to_string()
    };
    Devices {
        disk: list(&[
            format!("{},engine=inline", image("inline")),
            format!("{},engine=threads,queues=2", image("threads")),
            format!("{},overlay={}", image("base"), folder.path().join("overlay").display()),
        ]),
        pmem: list(&[image("pmem")]),
        net: list(&["tap0,vhost=off".into()]),
        rng: list(&[String::new()]),
        vsock: list(&[folder.path().join("vsock").display().to_string()]),
        share: list(&[format!("{},tag=shared", folder.path().display())]),
        balloon: list(&["4M,deflate-on-oom,free-page-reporting,stats-interval=1".into()]),
    }
}

/// A machine that tries each device as it is attached.
struct Suite {
    transport: Transport,
    /// What the devices of the first round were in, by their names; nothing of one that cannot be saved.
    saved: BTreeMap<String, Option<Saved>>,
    checked: usize,
}

impl Suite {
    fn check<R: Registers>(&mut self, mut subject: Subject<R>) {
        println!("{}", subject.name);
        match self.saved.remove(&subject.name) {
            Some(Some(saved)) => subject.goes_on(&saved),
            Some(None) => {}
            None => {
                subject.check();
                let name = subject.name.clone();
                self.saved.insert(name, subject.is_saved());
            }
        }
    }
}

impl Attach for Suite {
    fn attach<D: VirtioDevice>(&mut self, name: String, _: Option<Transport>, device: D) -> anyhow::Result<Handle<D>> {
        let kind = device.kind();
        match self.transport {
            Transport::Pci => self.check(Subject { name, kind, driver: testing::pci(device) }),
            _ => self.check(Subject { name, kind, driver: testing::mmio(device) }),
        }
        self.checked += 1;
        Ok(Arc::new(Tried))
    }

    fn place(&mut self, _: Arc<FileRegion>) -> anyhow::Result<u64> {
        Ok(1 << 40)
    }
}

/// The way to a device that has been tried, which nobody goes.
struct Tried;

impl<D: VirtioDevice> Access<D> for Tried {
    fn control(&self, _: Control<'_, D>) {
        unreachable!("a device that was tried is asked nothing");
    }
}

/// A device that is tried.
struct Subject<R: Registers> {
    name: String,
    kind: Kind,
    driver: Driver<R>,
}

/// A request that a device answers soon, whatever happens on the host.
struct Probe {
    queue: u16,
    readable: Vec<u8>,
    room: &'static [usize],
}

impl Probe {
    fn of(kind: Kind) -> Self {
        let (queue, readable, room): (u16, Vec<u8>, &[usize]) = match kind {
            // VIRTIO_BLK_T_IN of the first sector.
            Kind::Block => (0, vec![0; 16], &[512, 1]),
            // A flush.
            Kind::Pmem => (0, vec![0; 4], &[4]),
            Kind::Rng => (0, vec![], &[8]),
            // The number of one of the last pages, far from the rings.
            Kind::Balloon => (0, (RAM / 4096 - 8).to_le_bytes()[..4].to_vec(), &[]),
            Kind::Console => (1, b"text".to_vec(), &[]),
            // A frame that nobody is waiting for.
            Kind::Net => (1, vec![0; 12 + 60], &[]),
            // A packet to nobody.
            Kind::Vsock => (1, vec![0; 44], &[]),
            // An operation before the first, which opens a session.
            Kind::Fs => (1, [40_u32, 3].into_iter().flat_map(u32::to_le_bytes).chain([0; 32]).collect(), &[16]),
        };
        Self { queue, readable, room }
    }
}

impl<R: Registers> Subject<R> {
    fn check(&mut self) {
        self.works();
        self.is_reset_anywhere();
        self.refuses_features();
        self.takes_any_access_to_its_configuration();
        self.takes_any_kick_and_any_change_of_a_queue();
        self.is_reset_while_requests_are_outstanding();
        for queue in 0..self.queues() {
            for attack in ATTACKS {
                self.survives(queue, attack);
            }
            self.survives_requests_of_any_shape(queue);
        }
    }

    fn queues(&mut self) -> u16 {
        u16::try_from(self.driver.registers.read(Reg::QueueCount)).unwrap()
    }

    /// Resets the device, starts it and has it answer.
    #[track_caller]
    fn works(&mut self) {
        self.driver.boot(u64::MAX);
        self.answers();
    }

    #[track_caller]
    fn answers(&mut self) {
        let name = self.name.clone();
        assert!(self.try_answer(), "{name} does not work");
    }

    /// Sends the probe and waits for the answer, or for NEEDS_RESET. Whether it was an answer.
    ///
    /// Either way the device has looked by then at what its other queues were kicked for before.
    fn try_answer(&mut self) -> bool {
        let Probe { queue, readable, room } = Probe::of(self.kind);
        let pieces: Vec<&[u8]> = if readable.is_empty() { Vec::new() } else { vec![&readable] };
        let head = self.driver.send(queue, &pieces, room);
        self.driver.wait(Some(queue), "answer or give up", |driver| {
            if driver.status() & status::NEEDS_RESET != 0 {
                return Some(false);
            }
            std::iter::from_fn(|| driver.try_collect(queue)).any(|used| used.head == head).then_some(true)
        })
    }

    fn is_reset_anywhere(&mut self) {
        for steps in 0..=5 {
            self.driver.reset();
            for step in 0..steps {
                match step {
                    0 => self.driver.add_status(status::ACKNOWLEDGE),
                    1 => self.driver.add_status(status::DRIVER),
                    2 => assert!(self.driver.negotiate(u64::MAX)),
                    3 => self.driver.set_up(u16::MAX),
                    _ => self.driver.start(),
                }
            }
            self.driver.reset();
            self.driver.reset();
            self.works();
        }
    }

    fn refuses_features(&mut self) {
        let offered = self.driver.offered();
        let strange = (0..64).map(|bit| 1 << bit).filter(|bit| offered & bit == 0).map(|bit| offered | bit);
        for features in strange.chain([offered & !features::VERSION_1]) {
            self.driver.reset();
            assert!(!self.driver.insist(features), "{features:#x}");
            self.driver.add_status(status::DRIVER_OK);
            assert_eq!(self.driver.status() & status::DRIVER_OK, 0, "{features:#x}");
        }
        self.works();
    }

    fn takes_any_access_to_its_configuration(&mut self) {
        for running in [false, true] {
            self.driver.reset();
            if running {
                self.works();
            }
            let accesses = (0..300).chain([1024, 3800]).flat_map(|offset| [1, 2, 4, 8].map(|width| (offset, width)));
            for (offset, width) in accesses {
                let (mut whole, mut bytes) = ([0; 8], [0; 8]);
                self.driver.registers.read_config(offset, &mut whole[..width]);
                for (at, byte) in (offset..).zip(&mut bytes[..width]) {
                    self.driver.registers.read_config(at, std::slice::from_mut(byte));
                }
                if offset < 64 && offset.is_multiple_of(width as u64) {
                    assert_eq!(whole, bytes, "at {offset}, {width} wide");
                }
                for garbage in [[0xff; 8], [0x5a; 8], [0; 8]] {
                    self.driver.registers.write_config(offset, &garbage[..width]);
                }
            }
        }
        self.works();
    }

    fn takes_any_kick_and_any_change_of_a_queue(&mut self) {
        let count = self.queues();
        self.driver.reset();
        (0..count + 3).chain([u16::MAX]).for_each(|queue| self.driver.kick(queue));
        self.works();
        for queue in 0..count {
            self.driver.registers.write(Reg::QueueSelect, queue.into());
            for (register, value) in [(Reg::QueueSize, 1), (Reg::QueueDevice(Half::Low), 1), (Reg::QueueEnable, 0)] {
                self.driver.registers.write(register, value);
            }
        }
        (0..count + 3).chain([u16::MAX]).for_each(|queue| self.driver.kick(queue));
        self.answers();
    }

    fn is_reset_while_requests_are_outstanding(&mut self) {
        let Probe { queue: served, readable, room } = Probe::of(self.kind);
        for _ in 0..10 {
            self.driver.boot(u64::MAX);
            for queue in 0..self.queues() {
                for _ in 0..8 {
                    match queue == served {
                        true if readable.is_empty() => self.driver.add(queue, &[], room),
                        true => self.driver.add(queue, &[&readable], room),
                        false => self.driver.add(queue, &[], &[2048]),
                    };
                }
                self.driver.kick(queue);
            }
        }
        self.works();
    }

    /// Stops in the midst of its work and goes on, and leaves what it was in.
    fn is_saved(&mut self) -> Option<Saved> {
        self.works();
        if self.kind == Kind::Fs {
            // Nor does it harm to ask.
            let refusal = format!("{:#}", self.driver.save().err().expect("open files cannot be saved"));
            assert!(refusal.contains("unmount"), "{refusal}");
            self.answers();
            self.driver.reset();
            self.driver.save().unwrap();
            self.driver.registers.resume();
            self.works();
            return None;
        }
        self.driver.save().unwrap();
        self.driver.registers.resume();
        self.answers();
        // One that has stopped for good is saved as such.
        let served = Probe::of(self.kind).queue;
        let ring = &mut self.driver.rings[usize::from(served)];
        ring.publish(&self.driver.memory, ring.next_available.wrapping_add(0x4000));
        self.driver.kick(served);
        self.driver.wait_for_needs_reset();
        self.driver.save().unwrap();
        self.driver.registers.resume();
        assert_ne!(self.driver.status() & status::NEEDS_RESET, 0);
        self.works();
        Some(self.driver.save().unwrap())
    }

    /// Goes on from what another was in.
    fn goes_on(&mut self, saved: &Saved) {
        self.driver.load(saved).unwrap();
        self.answers();
        assert!(self.driver.registers.load(saved.state.clone()).is_err(), "{} takes a state while it runs", self.name);
        self.answers();
        self.driver.save().unwrap();
        self.driver.registers.resume();
        self.answers();
        self.withstands_any_state(saved);
    }

    /// A state is a file, which somebody may have changed: each of its values, in turn, is another or missing.
    fn withstands_any_state(&mut self, saved: &Saved) {
        let mut paths = Vec::new();
        leaves(&saved.state, String::new(), &mut paths);
        let values =
            ["0", "1", "2", "255", "65535", "4294967295", "18446744073709551615", "-1", "null", "\"\"", "[]", "{}"];
        let mut refused = 0;
        // The configuration space takes effect as if the guest had written it, and could move the registers away from us.
        for path in paths.into_iter().filter(|path| !path.starts_with("/config/")) {
            for value in values {
                let mut state = saved.state.clone();
                *state.pointer_mut(&path).unwrap() = value.parse().unwrap();
                self.driver.reset();
                match self.driver.registers.load(state) {
                    Ok(()) => {
                        self.driver.registers.resume();
                        (0..self.queues()).for_each(|queue| self.driver.kick(queue));
                    }
                    Err(_) => refused += 1,
                }
            }
        }
        assert!(refused > 0, "{} takes any state", self.name);
        self.works();
    }

    fn survives(&mut self, queue: u16, (name, attack): &Attack) {
        self.driver.boot(u64::MAX);
        attack(&self.driver.memory, &mut self.driver.rings[usize::from(queue)]);
        self.driver.kick(queue);
        if queue == Probe::of(self.kind).queue {
            self.driver.wait(None, name, |driver| (driver.status() & status::NEEDS_RESET != 0).then_some(()));
        } else {
            self.try_answer();
        }
        self.works();
    }

    fn survives_requests_of_any_shape(&mut self, queue: u16) {
        let mut dice = Dice(u64::from(queue) + 1);
        for _ in 0..60 {
            self.driver.boot(u64::MAX);
            let before = self.driver.rings[usize::from(queue)].next_used;
            for _ in 0..8 {
                let data: Vec<Vec<u8>> = (0..dice.below(4)).map(|_| dice.bytes()).collect();
                let readable: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
                let least = usize::from(readable.is_empty());
                let room: Vec<usize> = (least..least + dice.below(4).max(least)).map(|_| dice.length()).collect();
                self.driver.add(queue, &readable, &room);
            }
            let ring = &self.driver.rings[usize::from(queue)];
            ring.ask_for_interrupt(&self.driver.memory, before.wrapping_add(7));
            self.driver.kick(queue);
            if queue == Probe::of(self.kind).queue {
                let settled = |driver: &mut Driver<R>| {
                    let index = driver.rings[usize::from(queue)].used_index(&driver.memory);
                    let done = index == before.wrapping_add(8) || driver.status() & status::NEEDS_RESET != 0;
                    done.then_some(())
                };
                self.driver.wait(Some(queue), "answer everything or give up", settled);
            } else {
                self.try_answer();
            }
        }
        self.works();
    }
}

/// The paths of all values that hold no others; of a list as long as a page, those of the first few.
fn leaves(value: &Value, path: String, paths: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| leaves(value, format!("{path}/{name}"), paths));
        }
        Value::Array(items) => {
            paths.push(path.clone());
            items.iter().take(64).enumerate().for_each(|(at, value)| leaves(value, format!("{path}/{at}"), paths));
        }
        _ => paths.push(path),
    }
}

/// What a queue holds that no driver would put there.
type Attack = (&'static str, fn(&Ram, &mut Ring));

const ATTACKS: &[Attack] = &[
    ("give up over a circle", |memory, ring| {
        offer(memory, ring, &[chained(ring.buffer(0), 1), chained(ring.buffer(1), 0)]);
    }),
    ("give up over a wild address", |memory, ring| offer(memory, ring, &[room(RAM + 4096, 16)])),
    ("give up over a buffer that wraps", |memory, ring| offer(memory, ring, &[room(u64::MAX - 7, 16)])),
    ("give up over a buffer that leaves RAM", |memory, ring| offer(memory, ring, &[room(RAM - 8, u32::MAX)])),
    ("give up over an empty buffer", |memory, ring| offer(memory, ring, &[room(ring.buffer(0), 0)])),
    ("give up over a readable buffer after a writable one", |memory, ring| {
        let first = Descriptor { flags: WRITE | NEXT, next: 1, ..room(ring.buffer(0), 16) };
        offer(memory, ring, &[first, Descriptor { flags: 0, ..room(ring.buffer(1), 16) }]);
    }),
    ("give up over a descriptor that is not in the table", |memory, ring| {
        offer(memory, ring, &[chained(ring.buffer(0), u16::MAX)]);
    }),
    ("give up over an indirect table in an indirect table", |memory, ring| {
        let table = Descriptor { flags: INDIRECT, ..room(ring.buffer(0), 16) };
        table.store(memory, ring.buffer(0), 0);
        offer(memory, ring, &[table]);
    }),
    ("give up over a head that is not in the table", |memory, ring| ring.offer(memory, ring.size)),
    ("give up over an available index that is far ahead", |memory, ring| {
        ring.publish(memory, ring.next_available.wrapping_add(ring.size + 1));
    }),
];

fn room(address: u64, length: u32) -> Descriptor {
    Descriptor { address, length, flags: WRITE, next: 0 }
}

fn chained(address: u64, next: u16) -> Descriptor {
    Descriptor { address, length: 16, flags: NEXT, next }
}

/// Makes the chain available that begins with the first of these descriptors.
fn offer(memory: &Ram, ring: &mut Ring, descriptors: &[Descriptor]) {
    for (descriptor, index) in descriptors.iter().zip(0..) {
        descriptor.store(memory, ring.descriptors, index);
    }
    ring.offer(memory, 0);
}

/// Numbers that are the same each time (Knuth's linear congruential generator).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }

    /// Lengths at which requests of our devices begin or end.
    fn length(&mut self) -> usize {
        const LENGTHS: [usize; 10] = [1, 2, 4, 8, 12, 16, 44, 512, 513, 4096];
        LENGTHS[self.below(LENGTHS.len())]
    }

    /// Small numbers are the likelier ones, as most fields of requests are numbers of few values.
    fn bytes(&mut self) -> Vec<u8> {
        let most = [2, 16, 256][self.below(3)];
        (0..self.length()).map(|_| u8::try_from(self.below(most)).unwrap()).collect()
    }
}
