//! `cargo xtask bench io`: how fast disks and network cards are, beside QEMU's microvm.
//!
//! Both run the small kernel and the same initramfs, whose init is the load (`ci/guest/load.sh`), from the emulated
//! host's memory: fio on a raw file in tmpfs, iperf3 and single bytes over a tap. There are two clocks:
//!
//! - the instruction clock, with one processor for host and guest: without noise, it counts all that a request costs on
//!   either side, and knows nothing of what could run side by side;
//! - real time (`--real-time RUNS`), with two processors for host and guest, ours and QEMU's in turn in one emulated
//!   host, and the median of the runs. A busy machine makes it meaningless.
//!
//! QEMU has its devices on PCI, where it is faster than over MMIO, and io_uring in an I/O thread.
//!
//! Exits are those that KVM counts, to user space or not. What the start of a load costs is taken out of them by the
//! difference of a long and a short one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};

use super::inside::{Measure, Measured, Plan, Run};
use super::load::{DISK, Figure, Load, NET, script};
use super::record::{Record, ratio};
use super::{qemu, tools};
use crate::host::Host;
use crate::image;
use crate::{build, kernel, progress, setup};

const HEADER: &str = "\
# Figures of `cargo xtask bench io`, written by it with --record: nanoseconds on the instruction clock of the emulated
# host for a request or a MiB, and exits of a thousand requests. The figures hold for these versions of what they depend on.
";

const OURS: &str = "ours";
const QEMU: &str = "QEMU";
/// What is appended to the name of a run, and of the figures, with vhost-net.
const VHOST: &str = ", vhost";
const LOGIN: &str = "boot to login, Debian";
/// At most so much of QEMU's time.
const LOGIN_ASKED: f64 = 0.8;
const TAP: &str = "tap0";
/// How many times the amounts that suit the instruction clock are moved in real time.
const REAL_TIME_SCALE: u64 = 4;
/// Seconds that one machine may run.
const LIMIT: u64 = 120;

/// What `cargo xtask bench io` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write the figures on the instruction clock to resources/numbers/io.toml.
    #[arg(long)]
    record: bool,
    /// Measure in real time, too: so many runs of each.
    #[arg(long, value_name = "RUNS", default_value_t = 0)]
    real_time: usize,
    /// Leave out the boot of the Debian image.
    #[arg(long)]
    no_debian: bool,
    /// Compare the engines of disks, too.
    #[arg(long)]
    engines: bool,
}

/// Figures by the name of the load.
type Figures = BTreeMap<String, Figure>;

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run()?;
    let bench = Bench::new()?;
    let step = progress::step("Measuring on the instruction clock; this takes some minutes");
    let (plan, theirs) = (bench.our_plan(args)?, bench.qemu_plan(args)?);
    let host = Host { timeout: 1800, ..Host::default() };
    let (ours, theirs) = thread::scope(|scope| {
        let theirs = scope.spawn(|| theirs.carry_out(&host));
        let ours = plan.carry_out(&host)?;
        Ok::<_, anyhow::Error>((ours, theirs.join().expect("a measurement does not panic")?))
    })?;
    drop(step);
    println!("On the instruction clock, one processor:\n");
    print(&figures(&ours, OURS)?, &figures(&theirs, QEMU)?);
    for engine in ENGINES.iter().filter(|_| args.engines) {
        println!("\nengine={engine}:");
        for (name, figure) in figures(&ours, engine)? {
            println!("{name:40} {:>9} ns {:>9.2} exits", figure.nanoseconds, ratio(figure.exits, 1000));
        }
    }
    if let (Some(ours), Some(theirs)) = (ours.get(LOGIN), theirs.get(LOGIN)) {
        let (ours, theirs) = (ours.value, theirs.value);
        let part = ratio(ours, theirs);
        let seconds = |value| ratio(value, 1_000_000_000);
        println!("\n{LOGIN}: {:.3} s, QEMU {:.3} s: {part:.2}, asked {LOGIN_ASKED}", seconds(ours), seconds(theirs));
    }
    if args.record {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/numbers/io.toml");
        bench.record(&ours, &theirs)?.write(&file, HEADER)?;
    }
    if args.real_time > 0 {
        let measured = bench.in_real_time(args.real_time)?;
        println!("\nIn real time, two processors, median of {}:\n", args.real_time);
        print(&medians(&measured, OURS)?, &medians(&measured, QEMU)?);
    }
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
        versions.extend([("qemu".to_owned(), qemu::version()?), ("small kernel".to_owned(), kernel.package)]);
        let mut files = tools.host;
        files.extend([
            ("vmm".to_owned(), build::vmm()?),
            ("vmlinux".to_owned(), kernel.vmlinux),
            ("initramfs".to_owned(), tools.initramfs),
        ]);
        Ok(Self { files, qemu: qemu::files()?, versions })
    }

    fn our_plan(&self, args: &Args) -> Result<Plan> {
        let mut plan = self.plan(vec![our_run(OURS, "disk", "off", 1, 1), our_run(OURS, "disk", "on", 1, 1)]);
        for engine in ENGINES.iter().filter(|_| args.engines) {
            plan.runs.push(our_run(engine, &format!("disk,engine={engine}"), "none", 1, 1));
        }
        if !args.no_debian {
            add_debian(&mut plan)?;
            let words = "vmm --kernel vmlinuz --initrd initrd.img --mem 512M --disk debian.img";
            let mut words: Vec<String> = words.split(' ').map(str::to_owned).collect();
            words.extend(["--cmdline".to_owned(), "root=/dev/vda rw".to_owned()]);
            plan.runs.push(Run { name: LOGIN.to_owned(), words, measure: login() });
        }
        Ok(plan)
    }

    fn qemu_plan(&self, args: &Args) -> Result<Plan> {
        let mut plan = self.plan(vec![qemu_run("off", 1, 1), qemu_run("on", 1, 1)]);
        plan.files.extend(self.qemu.clone());
        if !args.no_debian {
            add_debian(&mut plan)?;
            let options = format!(
                "-M microvm,pcie=on -m 512 -serial stdio -kernel vmlinuz -initrd initrd.img {}",
                qemu_disk("debian.img")
            );
            let words = qemu::words("console=ttyS0 root=/dev/vda rw", &options);
            plan.runs.push(Run { name: LOGIN.to_owned(), words, measure: login() });
        }
        Ok(plan)
    }

    /// In turn, so that what else the machine does meets both.
    fn in_real_time(&self, runs: usize) -> Result<BTreeMap<String, Measured>> {
        let step = progress::step("Measuring in real time; this takes some minutes");
        let mut measured = BTreeMap::new();
        for number in 0..runs {
            step.at(&format!("{} of {runs}", number + 1));
            let pair = |vhost| [our_run(OURS, "disk", vhost, 2, REAL_TIME_SCALE), qemu_run(vhost, 2, REAL_TIME_SCALE)];
            let mut plan = self.plan(pair("off").into_iter().chain(pair("on")).collect());
            plan.files.extend(self.qemu.clone());
            let host = Host { timeout: 900, cpus: 2, ..Host::default() };
            let results = plan.carry_out(&host)?;
            measured.extend(results.into_iter().map(|(name, result)| (format!("{number} {name}"), result)));
        }
        Ok(measured)
    }

    fn plan(&self, runs: Vec<Run>) -> Plan {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect();
        let prepare = [
            "/bin/dd if=/dev/zero of=disk bs=1M count=64 status=none".to_owned(),
            format!("/sbin/ip tuntap add {TAP} mode tap"),
            format!("/sbin/ip address add 10.9.0.1/24 dev {TAP}"),
            format!("/sbin/ip link set {TAP} up"),
        ];
        let iperf3 = format!("{} --library-path . ./iperf3 --server", tools::LOADER);
        let services = ["rr 10.9.0.1:7777", &iperf3];
        Plan {
            files: self.files.clone(),
            prepare: prepare.iter().map(|line| words(line)).collect(),
            services: services.map(words).to_vec(),
            runs,
            // QEMU stands still in the emulated host now and then; what else was measured holds.
            tolerant: true,
        }
    }

    fn record(&self, ours: &BTreeMap<String, Measured>, theirs: &BTreeMap<String, Measured>) -> Result<Record> {
        let mut record = Record { versions: self.versions.clone(), figures: BTreeMap::new() };
        for (whose, measured) in [(OURS, ours), (QEMU, theirs)] {
            for (name, figure) in figures(measured, whose)? {
                record.figures.insert(format!("{name}, {whose}, exits"), figure.exits);
                record.figures.insert(format!("{name}, {whose}, ns"), figure.nanoseconds);
            }
            if let Some(login) = measured.get(LOGIN) {
                record.figures.insert(format!("{LOGIN}, {whose}, ns"), login.value);
            }
        }
        Ok(record)
    }
}

/// The name of a run, from which [`figures`] finds it.
fn run_name(whose: &str, vhost: &str) -> String {
    format!("{whose}{}", if vhost == "on" { VHOST } else { "" })
}

fn loads(vhost: &str) -> Vec<&'static Load> {
    match vhost {
        "on" => NET.iter().collect(),
        "none" => DISK.iter().collect(),
        _ => DISK.iter().chain(&NET).collect(),
    }
}

fn our_run(whose: &str, disk: &str, vhost: &str, cpus: u32, scale: u64) -> Run {
    let words = format!("vmm --kernel vmlinux --initrd initramfs --mem 512M --cpus {cpus} --disk {disk} --cmdline");
    let mut words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    words.push(format!("quiet load=\"{}\"", script(&loads(vhost), scale)));
    if vhost != "none" {
        words.extend(["--net".to_owned(), format!("tap={TAP},vhost={vhost}")]);
    }
    Run { name: run_name(whose, vhost), words, measure: Measure::Lines { code: 0, limit: LIMIT } }
}

fn qemu_run(vhost: &str, cpus: u32, scale: u64) -> Run {
    let cmdline = format!("console=ttyS0 reboot=t panic=-1 quiet load=\"{}\"", script(&loads(vhost), scale));
    let options = format!(
        "-M microvm,pcie=on -m 512 -smp {cpus} -serial stdio -kernel vmlinux -initrd initramfs {} \
         -netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost} -device virtio-net-pci,netdev=net,romfile=",
        qemu_disk("disk")
    );
    Run {
        name: run_name(QEMU, vhost),
        words: qemu::words(&cmdline, &options),
        measure: Measure::Lines { code: 0, limit: LIMIT },
    }
}

fn qemu_disk(file: &str) -> String {
    format!(
        "-object iothread,id=io -drive if=none,id=disk,file={file},format=raw,aio=io_uring \
         -device virtio-blk-pci,drive=disk,iothread=io"
    )
}

/// Adds the Debian image, which is as large as the emulated host's memory can hold only without its holes.
fn add_debian(plan: &mut Plan) -> Result<()> {
    let folder = image::plain_debian_image()?;
    for name in ["vmlinuz", "initrd.img"] {
        plan.files.insert(name.to_owned(), folder.join(name));
    }
    let image = folder.join("debian.img").display().to_string();
    plan.prepare.push(["/bin/cp", "--sparse=always", &image, "debian.img"].map(str::to_owned).to_vec());
    Ok(())
}

fn login() -> Measure {
    Measure::Until { text: "login: ".to_owned(), limit: LIMIT }
}

/// The figures of one VMM.
fn figures(measured: &BTreeMap<String, Measured>, whose: &str) -> Result<Figures> {
    let mut figures = Figures::new();
    for vhost in ["off", "on"] {
        let Some(measured) = measured.get(&run_name(whose, vhost)) else { continue };
        for load in loads(vhost) {
            let name = run_name(load.name, vhost);
            let figure = load.figure(&measured.lines, 1);
            if let Some(figure) = figure.with_context(|| format!("{whose}: {name}"))? {
                figures.insert(name, figure);
            }
        }
    }
    Ok(figures)
}

/// The median of each figure over the runs that gave it.
fn medians(measured: &BTreeMap<String, Measured>, whose: &str) -> Result<Figures> {
    let mut all: BTreeMap<String, Vec<Figure>> = BTreeMap::new();
    for (name, measured) in measured {
        let Some((_, name)) = name.split_once(' ') else { continue };
        let vhost = if name.ends_with(VHOST) { "on" } else { "off" };
        for load in loads(vhost).into_iter().filter(|_| name == run_name(whose, vhost)) {
            all.entry(run_name(load.name, vhost)).or_default().extend(load.figure(&measured.lines, REAL_TIME_SCALE)?);
        }
    }
    let middle = |mut figures: Vec<Figure>| {
        figures.sort_unstable_by_key(|figure| figure.nanoseconds);
        figures.get(figures.len() / 2).copied()
    };
    Ok(all.into_iter().filter_map(|(name, figures)| Some((name, middle(figures)?))).collect())
}

fn print(ours: &Figures, theirs: &Figures) {
    println!("{:42} {:>10} {:>10} {:>6} {:>6} {:>14}", "", OURS, QEMU, "times", "asked", "exits a piece");
    for vhost in ["off", "on"] {
        for load in loads(vhost) {
            let name = run_name(load.name, vhost);
            let shown = |figures: &Figures| figures.get(&name).map_or("-".to_owned(), |figure| load.shown(figure));
            let exits = |figures: &Figures| {
                figures.get(&name).map_or("-".to_owned(), |figure| format!("{:.1}", ratio(figure.exits, 1000)))
            };
            let times = match (ours.get(&name), theirs.get(&name)) {
                (Some(ours), Some(theirs)) => format!("{:.2}", ratio(theirs.nanoseconds, ours.nanoseconds)),
                _ => "-".to_owned(),
            };
            let asked = if vhost == "on" { 1.0 } else { load.asked };
            let exits = format!("{} / {}", exits(ours), exits(theirs));
            println!("{name:42} {:>10} {:>10} {times:>6} {asked:>6} {exits:>14}", shown(ours), shown(theirs));
        }
    }
}
