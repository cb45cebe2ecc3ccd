//! Stock kernels boot, in every way that they can be entered, and see the machine that was asked for.
//!
//! A guest costs seconds, so there are few, each asked much, and each ends in another way.

mod support;

use support::guest::Guest;
use support::machine::{MIB, SMALL, STOCK, assert_machine};
use support::process::Ended;
use support::tiny::Code;

/// Where a kernel that was not moved is linked to run: CONFIG_PHYSICAL_START, and that in the kernel's mapping.
const UNMOVED: Bases = Bases { virtual_: 0xffff_ffff_8100_0000, physical: 0x100_0000 };

/// Where a kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bases {
    virtual_: u64,
    physical: u64,
}

impl Bases {
    /// Asks a guest, as root: the addresses are hidden from others.
    fn of(guest: &mut Guest) -> Self {
        let hexadecimal =
            |text: &str| u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("{text:?} is no address"));
        let virtual_ = guest.ask("grep -m1 -w _text /proc/kallsyms");
        let physical = guest.ask("grep -m1 -w Kernel.code /proc/iomem");
        let first = |text: &str, end: char| hexadecimal(text.split(end).next().unwrap_or_default().trim());
        Self { virtual_: first(&virtual_, ' '), physical: first(&physical, '-') }
    }
}

/// Checks that the kernel complains of nothing that the platform promises.
fn assert_no_complaints(guest: &mut Guest) {
    let complaints =
        guest.ask("dmesg | grep -iE 'firmware bug|fw bug|ACPI.*(error|exception|warning)|BUG:|i8042.*fail' || true");
    assert_eq!(complaints, "");
}

/// Boots the kernel, whose addresses must be other ones than `others`. As one place in some hundred comes twice by
/// chance, a coincidence gets a second try.
fn boot_elsewhere(others: Bases, boot: impl Fn() -> Guest) -> Guest {
    let differ = |bases: Bases| bases.virtual_ != others.virtual_ && bases.physical != others.physical;
    let mut guest = boot();
    if !differ(Bases::of(&mut guest)) {
        guest = boot();
        assert!(differ(Bases::of(&mut guest)), "twice at {others:?}");
    }
    guest
}

/// What a boot may idle: two ticks of 10 ms, for rounding. A driver that sleeps until a device answers idles longer.
const IDLE_TICKS: u64 = 2;
/// So many accesses to ports a boot may make, and answer the questions here. A driver that polls a device which is not
/// there makes twice as many at least: i8042's timeout alone is 10,000 reads.
const PORT_EXITS: u64 = 5000;
/// The beginnings of the lines of the guest's log after which nothing was logged for half of the boot. How long a
/// boot takes depends on the host; that none of its many steps takes so large a part of it does not.
fn waits(guest: &mut Guest) -> Vec<String> {
    let gaps =
        r"dmesg|awk -F'[][]' '/^.[ 0-9.]*] /{t[++n]=$2;l[n]=$3}END{for(i=1;i<n;i++)if(t[i+1]-t[i]>t[n]/2)print l[i]}'";
    guest.ask(gaps).lines().map(|line| line.trim().chars().take(20).collect()).collect()
}

/// Checks that a guest with one processor, which has just booted, waited for nothing on its way.
fn assert_no_waits(guest: &mut Guest, boot: impl Fn() -> Guest) {
    assert!(guest.idle <= IDLE_TICKS, "it idled for {} ticks of 10 ms", guest.idle);
    let first = waits(guest);
    if !first.is_empty() {
        // A busy host stops guests too, but not in the same place twice.
        let second = waits(&mut boot());
        let both: Vec<_> = first.iter().filter(|line| second.contains(line)).collect();
        assert!(both.is_empty(), "it waits after {both:?}");
    }
    // What takes its time without a port or a sleep is the calibration of a clock; here it has none.
    assert_eq!(guest.ask("dmesg|grep -i calibrat|grep -v skipped || true"), "");
}

/// Checks that a guest which was started with `--log-level info` has polled no port.
fn assert_few_exits(ended: &Ended) {
    let exits = ended.stderr.split(" io=").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    let exits = exits.unwrap_or_else(|| panic!("the log has no number of exits: {}", ended.stderr));
    assert!(exits < PORT_EXITS, "{}", ended.stderr);
}

#[test]
fn debian_6_1_boots_from_a_bzimage_and_from_a_vmlinux_each_time_at_another_address() {
    let mut guest = Guest::boot("debian-6.1-vmlinuz", &[], "");
    assert_machine(&mut guest, 1, 512 * MIB, STOCK);
    assert_no_complaints(&mut guest);
    let first = Bases::of(&mut guest);
    guest.end("poweroff -f").assert(0, "the guest powered off");

    let boot = || Guest::boot("debian-6.1-vmlinux,entry=linux64", &["--on-reboot", "exit"], "");
    let mut guest = boot_elsewhere(first, boot);
    assert_machine(&mut guest, 1, 512 * MIB, STOCK);
    guest.end("reboot -f").assert(3, "the guest rebooted");
}

#[test]
fn debian_6_1_boots_by_its_pvh_entry() {
    let mut guest = Guest::boot("debian-6.1-vmlinux,entry=pvh", &[], "");
    assert_machine(&mut guest, 1, 512 * MIB, STOCK);
    assert_no_complaints(&mut guest);
    assert_eq!(Bases::of(&mut guest), UNMOVED);
    // Without a driver for pvpanic: it is told by the warm restart.
    let ended = guest.end("echo c > /proc/sysrq-trigger");
    ended.assert(4, "the guest's kernel panicked");
}

#[test]
fn debian_6_1_unpacks_itself() {
    let mut guest = Guest::boot("debian-6.1-vmlinuz,entry=unpack", &["--mem", "512M"], "nokaslr");
    assert_machine(&mut guest, 1, 512 * MIB, STOCK);
    assert_eq!(Bases::of(&mut guest), UNMOVED);
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

#[test]
fn debian_6_12_boots_from_a_vmlinux_and_stays_where_it_is_linked_to_without_kaslr() {
    let boot = || Guest::boot("debian-6.12-vmlinux", &["--log-level", "info"], "nokaslr");
    let mut guest = boot();
    assert_no_waits(&mut guest, boot);
    assert_eq!(Bases::of(&mut guest), UNMOVED);
    assert_no_complaints(&mut guest);
    // Nothing is masked here.
    assert_eq!(guest.ask("grep -cw rdrand /proc/cpuinfo"), "1");
    let ended = guest.end("poweroff -f");
    assert_eq!(ended.code, Some(0));
    assert_few_exits(&ended);
}

#[test]
fn debian_6_12_boots_by_its_pvh_entry() {
    let mut guest = Guest::boot("debian-6.12-vmlinuz,entry=pvh", &[], "");
    assert_machine(&mut guest, 1, 512 * MIB, STOCK);
    assert_no_complaints(&mut guest);
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

#[test]
fn the_small_kernel_boots_in_64_mib() {
    for kernel in ["small-bzImage", "small-vmlinux"] {
        let boot = || Guest::boot(kernel, &["--mem", "64M", "--log-level", "info"], "");
        let mut guest = boot();
        assert_no_waits(&mut guest, boot);
        assert_machine(&mut guest, 1, 64 * MIB, SMALL);
        assert_no_complaints(&mut guest);
        let ended = guest.end("poweroff -f");
        assert_eq!(ended.code, Some(0));
        assert_few_exits(&ended);
    }
}

#[test]
fn a_file_describes_the_machine_and_flags_override_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    let kernel = support::asset("small-bzImage");
    let text =
        format!("name = 'file'\n[kernel]\npath = '{}'\n[mem]\nsize = '64M'\n[cpus]\ncount = 1\n", kernel.display());
    std::fs::write(&file, text).unwrap();
    let config = file.to_str().expect("a name of ASCII letters");
    let vmm = support::guest::described(&["--config", config, "--mem", "96M"], "");
    let mut guest = Guest::listen(vmm.spawn());
    assert_machine(&mut guest, 1, 96 * MIB, SMALL);
    let ended = guest.end("poweroff -f");
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), "file: the guest powered off\n"));
}

#[test]
fn a_masked_feature_is_missing_from_cpuid_and_so_is_what_needs_it() {
    // Asked without a kernel, which may see no AVX at all: an emulated processor's XSAVE fails the checks of Linux.
    // Leaf 7, EBX: bit 5 is AVX2, which needs AVX; bit 8 is BMI2, which does not.
    let leaf7 = Code::default().print_cpuid_ebx(7).power_off();
    let features = |mask: &str| {
        let ended = leaf7.clone().halt().kernel(&[]).run(&["--cpus", &format!("1{mask}")], "");
        ended.assert(0, "the guest powered off");
        let ebx = u32::from_str_radix(&ended.stdout, 16).expect("eight digits");
        [ebx >> 5 & 1, ebx >> 8 & 1]
    };
    assert_eq!(features(""), [1, 1], "this host offers AVX2 and BMI2");
    assert_eq!(features(",features=-avx2"), [0, 1]);
    assert_eq!(features(",features=-avx"), [0, 1]);
    assert_eq!(features(",features=-avx2-bmi2"), [0, 0]);
}
