//! `cargo xtask bench io`: how fast disks and network cards are, beside QEMU's microvm.
//!
//! Both run the small kernel and the same initramfs, whose init is the load (`ci/guest/load.sh`), from the emulated
//! host's memory: fio on a raw file in tmpfs, iperf3 and single bytes over a tap. There are two clocks:
//!
//! - the instruction clock, with one processor for host and guest: without noise, it counts all that a request costs on
//!   either side, and knows nothing of what could run side by side. On it QEMU's SVM interrupts guests that have interrupts off: half of the
//!   machines stand still with a lock, so each has several chances;
//! - real time (`--real-time RUNS`), with two processors for host and guest, ours and QEMU's in turn in one emulated
//!   host, and the median of the runs. A busy machine makes it meaningless.
//!
//! QEMU is there twice: as its microvm comes, with devices over MMIO; and at its best, with devices on PCI and the disk in
//! an I/O thread. Both use io_uring.
//!
//! Exits are those that KVM counts, to user space or not. What the start of a load costs is taken out of them by the
//! difference of a long and a short one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;

use super::inside::{Measure, Measured, Plan, Run};
use super::load::{DISK, Load, NET, script};
use super::outcome::Outcome;
use super::record::{Record, Suite, ratio};
use super::table::{self, Figures};
use super::{qemu, tools};
use crate::host::Host;
use crate::host::emulator::Emulator;
use crate::image;
use crate::{build, kernel, progress, setup};

const HEADER: &str = "\
# Figures of `cargo xtask bench io`, written by it with --record: nanoseconds on the instruction clock of the emulated
# host for a request or a MiB, and exits of a thousand requests. The figures hold for these versions of what they depend on.
";

pub(super) const OURS: &str = "ours";

/// QEMU in one of its forms.
struct Peer {
    name: &'static str,
    machine: &'static str,
    disk: &'static str,
    net: &'static str,
}

const QEMU: Peer = Peer {
    name: "QEMU",
    machine: "microvm",
    disk: "-device virtio-blk-device,drive=disk",
    net: "virtio-net-device,netdev=net",
};
const QEMU_PCI: Peer = Peer {
    name: "QEMU PCI",
    machine: "microvm,pcie=on",
    disk: "-object iothread,id=io -device virtio-blk-pci,drive=disk,iothread=io",
    net: "virtio-net-pci,netdev=net,romfile=",
};
/// The first is what the figures asked for are of.
const PEERS: [&Peer; 2] = [&QEMU, &QEMU_PCI];
const CONTENDERS: [&str; 3] = [OURS, QEMU.name, QEMU_PCI.name];

/// What is appended to the name of figures with vhost-net.
const VHOST: &str = ", vhost";
const TAP: &str = "tap0";
/// The processors of a machine, and the seconds that it may run on its host's clock. On the instruction clock it takes about
/// one, or stands still.
#[derive(Clone, Copy)]
struct Clock {
    cpus: u32,
    limit: u64,
}

const INSTRUCTIONS: Clock = Clock { cpus: 1, limit: 8 };
const REAL: Clock = Clock { cpus: 2, limit: 120 };
/// Seconds for Debian to come to its login prompt.
const LOGIN_LIMIT: u64 = 120;
/// How many machines a host on the instruction clock has one after the other, and the seconds that it has for them. They
/// take some twenty; the host itself may stand still, too.
const TOGETHER: usize = 3;
const TIME_LIMIT: u64 = 120;
/// Seconds that it has for Debian.
const LOGIN_TIME_LIMIT: u64 = 600;

/// What `cargo xtask bench io` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) outcome: Outcome,
    /// Measure in real time, too: so many runs of each.
    #[arg(long, value_name = "RUNS", default_value_t = 0)]
    pub(super) real_time: usize,
    /// Leave out the boot of the Debian image, and with it record and promises.
    #[arg(long, conflicts_with_all = ["record", "check"])]
    pub(super) no_debian: bool,
    /// Compare the engines of disks, too.
    #[arg(long)]
    pub(super) engines: bool,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run()?;
    let bench = Bench::new()?;
    let step = progress::step("Measuring on the instruction clock; this takes some minutes");
    let host = Host { timeout: TIME_LIMIT, icount: true, ..Host::default() };
    let mut measured = bench.loads(args).carry_out(&host, TOGETHER)?;
    if !args.no_debian {
        let host = Host { timeout: LOGIN_TIME_LIMIT, ..host };
        measured.extend(bench.logins()?.carry_out(&host, 1)?);
    }
    drop(step);
    println!("On the instruction clock, one processor:\n");
    print(|whose| table::figures(&measured, whose))?;
    for engine in ENGINES.iter().filter(|_| args.engines) {
        println!("\nengine={engine}:");
        for (name, figure) in table::figures(&measured, engine)? {
            println!("{name:40} {:>9} ns {:>9.2} exits", figure.nanoseconds, ratio(figure.exits, 1000));
        }
    }
    println!();
    if !args.no_debian {
        args.outcome.judge(Suite::Io, &bench.record(&measured)?, HEADER, |_| 0)?;
    }
    if args.real_time > 0 {
        let measured = bench.in_real_time(args.real_time)?;
        println!("\nIn real time, two processors, median of {}:\n", args.real_time);
        print(|whose| table::medians(&measured, whose))?;
    }
    Ok(())
}

fn print(figures: impl Fn(&str) -> Result<Figures>) -> Result<()> {
    let [ours, mmio, pci] = CONTENDERS.map(figures);
    table::print(&[ours?, mmio?, pci?]);
    Ok(())
}

const ENGINES: [&str; 3] = ["inline", "io-uring", "threads"];

/// What all plans are made of.
struct Bench {
    files: BTreeMap<String, PathBuf>,
    qemu: BTreeMap<String, PathBuf>,
    versions: BTreeMap<String, String>,
}

impl Bench {
    fn new() -> Result<Self> {
        let (kernel, tools) = (kernel::small_kernel()?, tools::tools()?);
        let mut versions = tools.versions;
        versions.extend([
            ("qemu".to_owned(), qemu::version()?),
            ("emulated host's qemu".to_owned(), Emulator::find()?.version.clone()),
            ("small kernel".to_owned(), kernel.package),
        ]);
        let mut files = tools.host;
        files.extend([
            ("vmm".to_owned(), build::vmm()?),
            ("vmlinux".to_owned(), kernel.vmlinux),
            ("initramfs".to_owned(), tools.initramfs),
        ]);
        Ok(Self { files, qemu: qemu::files()?, versions })
    }

    fn loads(&self, args: &Args) -> Plan {
        let mut plan = self.plan(Vec::new());
        for vhost in ["off", "on"] {
            for peer in PEERS {
                plan.runs.extend(loads(vhost).map(|load| peer.run(vhost, load, INSTRUCTIONS)));
            }
            plan.runs.extend(loads(vhost).map(|load| our_run(OURS, "disk", vhost, load, INSTRUCTIONS)));
        }
        for engine in ENGINES.iter().filter(|_| args.engines) {
            let disk = format!("disk,engine={engine}");
            plan.runs.extend(DISK.iter().map(|load| our_run(engine, &disk, "none", load, INSTRUCTIONS)));
        }
        plan
    }

    /// The image is as large as the emulated host's memory can hold only without its holes.
    fn logins(&self) -> Result<Plan> {
        let mut plan = self.plan(Vec::new());
        let folder = image::plain_debian_image()?;
        for name in ["vmlinuz", "initrd.img"] {
            plan.files.insert(name.to_owned(), folder.join(name));
        }
        let image = folder.join("debian.img").display().to_string();
        plan.prepare.push(["/bin/cp", "--sparse=always", &image, "debian.img"].map(str::to_owned).to_vec());
        let words = "vmm --kernel vmlinuz --initrd initrd.img --mem 512M --disk debian.img";
        let mut words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        words.extend(["--cmdline".to_owned(), "root=/dev/vda rw".to_owned()]);
        plan.runs.push(Run { name: login_name(OURS), words, measure: login() });
        for peer in PEERS {
            let options = format!(
                "-M {} -m 512 -serial stdio -kernel vmlinuz -initrd initrd.img {}",
                peer.machine,
                peer.disk("debian.img")
            );
            let words = qemu::words("console=ttyS0 root=/dev/vda rw", &options);
            plan.runs.push(Run { name: login_name(peer.name), words, measure: login() });
        }
        Ok(plan)
    }

    /// In turn, so that what else the machine does meets both.
    fn in_real_time(&self, runs: usize) -> Result<BTreeMap<String, Measured>> {
        let step = progress::step("Measuring in real time; this takes some minutes");
        let mut measured = BTreeMap::new();
        for number in 0..runs {
            step.at(&format!("{} of {runs}", number + 1));
            let mut plan = self.plan(Vec::new());
            for vhost in ["off", "on"] {
                for load in loads(vhost) {
                    plan.runs.push(our_run(OURS, "disk", vhost, load, REAL));
                    plan.runs.extend(PEERS.map(|peer| peer.run(vhost, load, REAL)));
                }
            }
            let host = Host { timeout: 900, cpus: 2, ..Host::default() };
            let results = plan.carry_out_together(&host)?;
            measured.extend(results.into_iter().map(|(name, result)| (format!("{number} {name}"), result)));
        }
        Ok(measured)
    }

    fn plan(&self, runs: Vec<Run>) -> Plan {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect();
        let files = self.files.iter().chain(&self.qemu).map(|(name, file)| (name.clone(), file.clone())).collect();
        let prepare = [
            "/bin/dd if=/dev/zero of=disk bs=1M count=64 status=none".to_owned(),
            format!("/sbin/ip tuntap add {TAP} mode tap"),
            format!("/sbin/ip address add 10.9.0.1/24 dev {TAP}"),
            format!("/sbin/ip link set {TAP} up"),
        ];
        let iperf3 = format!("{} --library-path . ./iperf3 --server", tools::LOADER);
        let services = ["rr 10.9.0.1:7777", &iperf3];
        Plan {
            files,
            prepare: prepare.iter().map(|line| words(line)).collect(),
            root: None,
            services: services.map(words).to_vec(),
            runs,
            // QEMU stands still in the emulated host now and then; what else was measured holds.
            tolerant: true,
        }
    }

    fn record(&self, measured: &BTreeMap<String, Measured>) -> Result<Record> {
        let mut record = Record { versions: self.versions.clone(), figures: BTreeMap::new() };
        for whose in CONTENDERS {
            for (name, figure) in table::figures(measured, whose)? {
                record.figures.insert(format!("{name}, {whose}, exits"), figure.exits);
                record.figures.insert(format!("{name}, {whose}, ns"), figure.nanoseconds);
            }
            if let Some(login) = measured.get(&login_name(whose)) {
                record.figures.insert(format!("{}, ns", login_name(whose)), login.value);
            }
        }
        Ok(record)
    }
}

fn login_name(whose: &str) -> String {
    format!("boot to login, Debian, {whose}")
}

/// The name of a run, by which [`table::figures`] finds it.
pub(super) fn run_name(whose: &str, vhost: &str, load: &Load) -> String {
    format!("{whose}: {}", figure_name(vhost, load))
}

/// What the figures of a load are called.
pub(super) fn figure_name(vhost: &str, load: &Load) -> String {
    format!("{}{}", load.name, if vhost == "on" { VHOST } else { "" })
}

/// What is measured so. With vhost-net a disk is no other.
pub(super) fn loads(vhost: &str) -> impl Iterator<Item = &'static Load> {
    DISK.iter().filter(move |_| vhost != "on").chain(&NET)
}

fn our_run(whose: &str, disk: &str, vhost: &str, load: &Load, Clock { cpus, limit }: Clock) -> Run {
    let words = format!("vmm --kernel vmlinux --initrd initramfs --mem 512M --cpus {cpus} --disk {disk} --cmdline");
    let mut words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    words.push(format!("quiet load=\"{}\"", script(load)));
    if vhost != "none" {
        words.extend(["--net".to_owned(), format!("tap={TAP},vhost={vhost}")]);
    }
    Run { name: run_name(whose, vhost, load), words, measure: Measure::Lines { code: 0, limit } }
}

impl Peer {
    fn run(&self, vhost: &str, load: &Load, Clock { cpus, limit }: Clock) -> Run {
        let cmdline = format!("console=ttyS0 reboot=t panic=-1 quiet load=\"{}\"", script(load));
        let options = format!(
            "-M {} -m 512 -smp {cpus} -serial stdio -kernel vmlinux -initrd initramfs {} \
             -netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost} -device {}",
            self.machine,
            self.disk("disk"),
            self.net
        );
        Run {
            name: run_name(self.name, vhost, load),
            words: qemu::words(&cmdline, &options),
            measure: Measure::Lines { code: 0, limit },
        }
    }

    fn disk(&self, file: &str) -> String {
        format!("-drive if=none,id=disk,file={file},format=raw,aio=io_uring {}", self.disk)
    }
}

fn login() -> Measure {
    Measure::Until { text: "login: ".to_owned(), limit: LOGIN_LIMIT }
}
