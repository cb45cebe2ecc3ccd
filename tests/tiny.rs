//! How machines end, shown by kernels of a few instructions. They need no real KVM: where `/dev/kvm` only emulates,
//! they run too.

mod support;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::process::{Running, Vmm};
use support::tiny::{CANNOT_BE_EMULATED, Code, Kernel, puppet};
use support::until;

const REBOOT_EXITS: &[&str] = &["--on-reboot", "exit"];

/// A kernel that does one thing.
fn kernel(code: Code) -> Kernel {
    code.halt().kernel(&[])
}

/// A kernel that resets its machine for an `r`, panics for a `p`, and powers off for a `q`.
fn ender() -> Kernel {
    puppet(&[(b'r', Code::default().reset()), (b'p', Code::default().pvpanic()), (b'q', Code::default().power_off())])
}

#[test]
fn a_power_off_is_exit_code_0() {
    kernel(Code::default().power_off()).run(&[], "").assert(0, "the guest powered off");
}

#[test]
fn a_reset_is_exit_code_3_by_the_acpi_register_and_by_the_keyboard_controller() {
    for code in [Code::default().reset(), Code::default().keyboard_reset()] {
        kernel(code).run(REBOOT_EXITS, "").assert(3, "the guest rebooted");
    }
}

#[test]
fn a_panic_reported_to_pvpanic_is_exit_code_4() {
    kernel(Code::default().pvpanic()).run(&[], "").assert(4, "the guest's kernel panicked");
}

#[test]
fn a_warm_reset_is_a_panic_only_where_the_command_line_makes_it_one() {
    let warm = kernel(Code::default().reset_word(0x1234).reset());
    warm.run(&[], "").assert(4, "the guest's kernel panicked");
    let kernel_decides = [REBOOT_EXITS, &["--cmdline==reboot=warm"]].concat();
    warm.run(&kernel_decides, "").assert(3, "the guest rebooted");
}

#[test]
fn a_cold_reset_by_triple_fault_is_a_reboot() {
    kernel(Code::default().reset_word(0).fault()).run(REBOOT_EXITS, "").assert(3, "the guest rebooted");
}

#[test]
fn a_triple_fault_that_no_kernel_announced_is_exit_code_5() {
    kernel(Code::default().fault()).run(&[], "").assert(5, "the guest crashed with a triple fault");
}

#[test]
fn what_kvm_cannot_emulate_is_exit_code_6_and_shows_the_instruction() {
    let ended = kernel(Code::default().cannot_be_emulated()).run(&[], "");
    assert_eq!((ended.code, ended.stderr.lines().count()), (Some(6), 1), "{ended:#?}");
    let bytes: Vec<String> = CANNOT_BE_EMULATED.iter().map(|byte| format!("{byte:02x}")).collect();
    for part in [&bytes.join(" "), "0x100005", "64-bit long mode"] {
        assert!(ended.stderr.contains(part), "{part} is not in {}", ended.stderr);
    }
}

#[test]
fn this_hosts_kvm_is_blamed_exactly_where_it_cannot_run_kernels() {
    let ended = kernel(Code::default().cannot_be_emulated()).run(&[], "");
    let usable = Vmm::new(["check"]).run().code == Some(0);
    assert_eq!(ended.stderr.contains("an unmodified kernel cannot boot"), !usable, "{ended:#?}");
}

#[test]
fn a_failure_of_the_host_is_exit_code_1_and_one_line() {
    let path = kernel(Code::default().power_off());
    let ended = path.vmm(&[]).by(&["prlimit", "--nofile=8"]).run();
    assert_eq!((ended.code, ended.stderr.lines().count()), (Some(1), 1), "{ended:#?}");
    assert!(ended.stderr.contains("Too many open files"), "{}", ended.stderr);
}

#[test]
fn every_reboot_is_answered_with_a_fresh_machine_in_the_same_process() {
    let kernel = ender();
    let mut vmm = kernel.start(&[], "");
    let mut seen = 0;
    for _ in 0..5 {
        seen = vmm.stdout().wait_for(">", seen);
        vmm.send("r");
    }
    vmm.stdout().wait_for(">", seen);
    vmm.send("q");
    let ended = vmm.wait();
    ended.assert(0, "the guest powered off");
    assert_eq!(ended.stdout, ">>>>>>");
}

#[test]
fn a_panic_is_answered_with_a_fresh_machine_where_that_is_asked_for() {
    let ended = ender().run(&["--on-panic", "restart"], "ppq");
    ended.assert(0, "the guest powered off");
    assert_eq!(ended.stdout, ">>>");
}

#[test]
fn what_is_typed_while_a_machine_restarts_reaches_the_next_one() {
    let ended = ender().run(&[], "ar bq");
    ended.assert(0, "the guest powered off");
    assert_eq!(ended.stdout, ">a> b");
}

/// Starts a guest that hears no power button, and sends it a signal.
fn deaf(signal: Signal, code: Code) -> Running {
    // It says that it runs; then it does what the code says.
    let vmm = code.kernel(b"here\n").start(&["--log-level", "info"], "");
    vmm.stdout().wait_for("here\n", 0);
    vmm.signal(signal);
    vmm.stderr.wait_for("power button", 0);
    vmm
}

#[test]
fn a_second_signal_ends_a_guest_that_does_not_hear_its_power_button() {
    for code in [Code::default().print(5).spin(), Code::default().print(5).halt()] {
        for (signal, number) in [(Signal::TERM, 15), (Signal::INT, 2)] {
            let mut vmm = deaf(signal, code.clone());
            assert!(vmm.is_running(), "the first signal only presses the button");
            vmm.signal(signal);
            let ended = vmm.wait();
            assert_eq!(ended.code, Some(128 + number), "{ended:#?}");
            let last = ended.stderr.lines().last();
            let line = format!("vmm: ended by signal {number} before the guest powered off");
            assert_eq!(last, Some(line.as_str()));
        }
    }
}

#[test]
fn a_guest_that_reboots_instead_of_powering_off_is_not_started_again() {
    let kernel = ender();
    let vmm = &mut kernel.start(&["--log-level", "info"], "");
    vmm.stdout().wait_for(">", 0);
    vmm.signal(Signal::TERM);
    vmm.stderr.wait_for("power button", 0);
    vmm.send("r");
    vmm.stderr.wait_for("vmm: the guest rebooted\n", 0);
}

#[test]
fn the_boot_mark_ends_the_boot_timer_and_nothing_else() {
    let ended = kernel(Code::default().boot_mark().boot_mark().power_off()).run(&["--boot-timer"], "");
    assert_eq!(ended.code, Some(0));
    let lines = ended.stderr.lines().filter_map(|line| line.strip_prefix("boot-timer: ")?.strip_suffix(" us"));
    let phases: Vec<(&str, u64)> = lines
        .map(|line| line.split_once(' ').expect("a name and a time"))
        .map(|(name, time)| (name, time.parse().expect("microseconds")))
        .collect();
    assert!(phases.is_sorted_by_key(|(_, time)| *time), "{phases:?}");
    let names: Vec<&str> = phases.iter().map(|(name, _)| *name).collect();
    assert!(names.ends_with(&["first-instruction", "guest-mark"]), "{names:?}");
}

#[test]
fn text_written_by_string_instructions_arrives_whole() {
    let text: String = (0..200).map(|number| format!("line {number}\n")).collect();
    let ended = Code::default().print(text.len()).power_off().halt().kernel(text.as_bytes()).run(&[], "");
    assert_eq!(ended.code, Some(0));
    assert_eq!(ended.stdout, text);
}

#[test]
fn a_name_is_in_the_process_list_and_in_messages() {
    let kernel = ender();
    let mut vmm = kernel.start(&["--name", "web"], "");
    vmm.stdout().wait_for(">", 0);
    assert_eq!(vmm.proc("comm").trim(), "web");
    vmm.send("q");
    let ended = vmm.wait();
    assert_eq!(ended.stderr, "web: the guest powered off\n");
}

#[test]
fn each_processor_has_a_thread_of_its_name() {
    let vmm = ender().start(&["--cpus", "3"], "");
    vmm.stdout().wait_for(">", 0);
    for name in ["vcpu-0", "vcpu-1", "vcpu-2"] {
        // A thread gives itself its name, some time after its start.
        until(name, || vmm.thread_names().iter().filter(|other| *other == name).count() == 1);
    }
}

#[test]
fn a_machine_with_255_processors_starts_and_ends() {
    kernel(Code::default().power_off()).run(&["--cpus", "255"], "").assert(0, "the guest powered off");
}

#[test]
fn a_halted_guest_and_an_input_at_its_end_cost_no_time() {
    let mut vmm = Code::default().print(5).halt().kernel(b"here\n").start(&[], "");
    vmm.stdout().wait_for("here\n", 0);
    vmm.close_input();
    // Time is what is measured here: a loop that spins takes all of it.
    let (start, before) = (Instant::now(), vmm.processor_ticks());
    std::thread::sleep(Duration::from_millis(500));
    let spent = vmm.processor_ticks() - before;
    assert!(vmm.is_running());
    // A tick is 10 ms.
    assert!(spent <= 10, "{spent} ticks of processor time went by in {:?}", start.elapsed());
}
