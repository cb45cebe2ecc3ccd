//! Compiles `resources/seccomp/policy.toml` into the filters that are a part of the program, and lists the names of all
//! system calls for the line that tells which one was stopped.
//!
//! The calls are looked for one after the other, in the order of the policy: two instructions each, so that the filters
//! are a small part of a small program. (A tree would save the busiest thread, for its one call, nothing.)

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use syscalls::x86_64::Sysno;
use toml::{Table, Value};

fn main() {
    let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../resources/seccomp/policy.toml");
    println!("cargo:rerun-if-changed={}", policy.display());
    let text = fs::read_to_string(&policy).expect("the policy is there");
    let policy = Policy(text.parse().expect("the policy is TOML"));
    let mut source = String::from(
        "/// The filters by the kind of thread.\npub(super) static FILTERS: &[(&str, &[sock_filter])] = &[\n",
    );
    for (thread, names) in policy.table("threads") {
        let mut calls = Vec::new();
        policy.collect(names, &mut calls);
        writeln!(source, "({thread:?}, &[").expect("memory");
        for (code, jt, jf, k) in compile(&calls) {
            writeln!(source, "sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},").expect("memory");
        }
        source.push_str("]),\n");
    }
    source.push_str("];\n/// The names of the system calls, one after the other by their numbers.\n");
    let last = Sysno::last().id();
    let names =
        (0..=last).map(|number| usize::try_from(number).ok().and_then(Sysno::new).map_or("", |call| call.name()));
    writeln!(source, "pub(super) static NAMES: &str = {:?};", names.collect::<Vec<_>>().join(" ")).expect("memory");
    let out = env::var_os("OUT_DIR").expect("Cargo says where to put what is built");
    fs::write(Path::new(&out).join("filters.rs"), source).expect("what is built can be written");
}

/// A system call, and the arguments that it is allowed with: any where there are none.
struct Call {
    number: u32,
    allowed: Vec<Argument>,
}

#[derive(Clone, Copy, PartialEq)]
struct Argument {
    index: u32,
    mask: u32,
    value: u32,
}

struct Policy(Table);

impl Policy {
    fn table(&self, name: &str) -> &Table {
        self.0.get(name).and_then(Value::as_table).unwrap_or_else(|| panic!("the policy has a table {name}"))
    }

    /// Adds what `names`, the names of sets, of checked calls and of calls, come to.
    fn collect(&self, names: &Value, calls: &mut Vec<Call>) {
        for name in names.as_array().expect("a list").iter().map(|name| name.as_str().expect("a name")) {
            if let Some(names) = self.table("sets").get(name).or_else(|| self.table("threads").get(name)) {
                self.collect(names, calls);
                continue;
            }
            let checked = self.table("checked").get(name);
            let call = checked.map_or(name, |checked| checked["call"].as_str().expect("a name"));
            let call: Sysno =
                call.parse().unwrap_or_else(|_| panic!("the policy names {call}, which is no call and no set"));
            let number = u32::try_from(call.id()).expect("a number");
            let argument = checked.map(argument);
            match (calls.iter_mut().find(|call| call.number == number), argument) {
                (None, argument) => calls.push(Call { number, allowed: argument.into_iter().collect() }),
                (Some(call), None) => call.allowed.clear(),
                (Some(call), Some(argument)) if !call.allowed.is_empty() && !call.allowed.contains(&argument) => {
                    call.allowed.push(argument);
                }
                // It is allowed already.
                _ => {}
            }
        }
    }
}

/// `{ call = "ioctl", argument = 1, mask = 0xff00, value = 0xae00 }`; the mask is all bits unless said.
fn argument(table: &Value) -> Argument {
    let number = |key: &str| table.get(key).map(|value| value.as_integer().and_then(|value| u32::try_from(value).ok()));
    let number = |key: &str| number(key).map(|value| value.expect("a number of 32 bits"));
    let (index, value) = (number("argument").expect("the argument's number"), number("value").expect("a value"));
    Argument { index, mask: number("mask").unwrap_or(u32::MAX), value }
}

/// An instruction of classic BPF (linux/bpf_common.h): what it does, how many to skip if so and if not, and its operand.
type Instruction = (u16, u8, u8, u32);

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP_IF_EQUAL: u16 = 0x15;
/// SECCOMP_RET_ALLOW, SECCOMP_RET_TRAP, SECCOMP_RET_KILL_PROCESS (linux/seccomp.h).
const ALLOW: Instruction = (0x06, 0, 0, 0x7fff_0000);
const TRAP: Instruction = (0x06, 0, 0, 0x0003_0000);
const KILL: Instruction = (0x06, 0, 0, 0x8000_0000);
/// Offsets in `struct seccomp_data`, and AUDIT_ARCH_X86_64.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
const X86_64: u32 = 0xc000_003e;

fn compile(calls: &[Call]) -> Vec<Instruction> {
    let mut program = vec![(LOAD, 0, 0, ARCHITECTURE), (JUMP_IF_EQUAL, 1, 0, X86_64), KILL, (LOAD, 0, 0, NUMBER)];
    for call in calls {
        let mut allowed = Vec::new();
        for Argument { index, mask, value } in &call.allowed {
            allowed.push((LOAD, 0, 0, ARGUMENTS + 8 * index));
            allowed.extend((*mask != u32::MAX).then_some((AND, 0, 0, *mask)));
            allowed.extend([(JUMP_IF_EQUAL, 0, 1, *value), ALLOW]);
        }
        allowed.push(if call.allowed.is_empty() { ALLOW } else { TRAP });
        let over = u8::try_from(allowed.len()).expect("few arguments are allowed");
        program.push((JUMP_IF_EQUAL, 0, over, call.number));
        program.extend(allowed);
    }
    program.push(TRAP);
    program
}
