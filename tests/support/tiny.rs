//! Kernels of a few instructions, which run on any KVM, also on one that emulates.
//!
//! They are ELF files that are entered in 64-bit mode, with an empty interrupt descriptor table: any fault is a triple
//! fault. Port numbers are those of the platform's registers.

use std::fs;
use std::path::PathBuf;
use std::rc::Rc;

use tempfile::TempDir;

use super::elf::{Elf, Segment};
use super::process::{Ended, Running, Vmm};

/// Where they are loaded, and where in them data starts.
const BASE: u32 = 1 << 20;
const DATA: u32 = BASE + 0x1000;

const SERIAL: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;

/// Instructions.
#[derive(Clone, Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub(crate) fn out(self, port: u16, value: u8) -> Self {
        self.port(port).bytes(&[0xb0, value, 0xee])
    }

    /// Powers the machine off: sleep type 5 and the enable bit, to the sleep control register.
    pub(crate) fn power_off(self) -> Self {
        self.out(0x600, 5 << 2 | 1 << 5)
    }

    /// The reset register that the FADT names.
    pub(crate) fn reset(self) -> Self {
        self.out(0x602, 1)
    }

    /// The keyboard controller's reset command.
    pub(crate) fn keyboard_reset(self) -> Self {
        self.out(0x64, 0xfe)
    }

    /// The event "panicked", to pvpanic.
    pub(crate) fn pvpanic(self) -> Self {
        self.out(0x505, 1)
    }

    /// The end of the boot, for `--boot-timer`.
    pub(crate) fn boot_mark(self) -> Self {
        self.out(0x500, 0x7b)
    }

    /// `mov word [0x472], value`: what a Linux kernel leaves before it restarts the machine.
    pub(crate) fn reset_word(self, value: u16) -> Self {
        self.bytes(&[0x66, 0xc7, 0x04, 0x25, 0x72, 0x04, 0, 0]).bytes(&value.to_le_bytes())
    }

    /// `ud2`
    pub(crate) fn fault(self) -> Self {
        self.bytes(&[0x0f, 0x0b])
    }

    /// `mov esi, 0xd0000000; lock cmpxchg16b [rsi]`: no RAM is there, and KVM emulates this instruction nowhere.
    pub(crate) fn cannot_be_emulated(self) -> Self {
        self.bytes(&[0xbe, 0, 0, 0, 0xd0]).bytes(&CANNOT_BE_EMULATED)
    }

    /// `jmp` to itself.
    pub(crate) fn spin(self) -> Self {
        self.bytes(&[0xeb, 0xfe])
    }

    /// `cli; hlt`, and again.
    pub(crate) fn halt(self) -> Self {
        self.bytes(&[0xfa, 0xf4, 0xeb, 0xfc])
    }

    /// Writes `length` bytes of the data to the serial port by one `rep outsb`.
    pub(crate) fn print(self, length: usize) -> Self {
        let length = u32::try_from(length).expect("a short text");
        let source = self.bytes(&[0xbe]).bytes(&DATA.to_le_bytes());
        source.bytes(&[0xb9]).bytes(&length.to_le_bytes()).port(SERIAL).bytes(&[0xf3, 0x6e])
    }

    /// Writes EBX of a CPUID leaf's subleaf 0 to the serial port, as eight hexadecimal digits.
    pub(crate) fn print_cpuid_ebx(self, leaf: u8) -> Self {
        // mov eax, leaf; xor ecx, ecx; cpuid; mov ecx, 8
        let cpuid = self.bytes(&[0xb8, leaf, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2, 0xb9, 8, 0, 0, 0]).port(SERIAL);
        // rol ebx, 4; mov al, bl; and al, 15; add al, '0'; cmp al, '9'
        let digit = cpuid.bytes(&[0xc1, 0xc3, 4, 0x88, 0xd8, 0x24, 15, 0x04, b'0', 0x3c, b'9']);
        // jbe over: add al, 'a' - '0' - 10; out dx, al; dec ecx; jnz to the rol
        digit.bytes(&[0x76, 2, 0x04, b'a' - b'0' - 10, 0xee, 0xff, 0xc9, 0x75, 0xec])
    }

    /// `mov dx, port`
    fn port(self, port: u16) -> Self {
        self.bytes(&[0x66, 0xba]).bytes(&port.to_le_bytes())
    }

    /// A kernel of these instructions and `data`.
    pub(crate) fn kernel(self, data: &[u8]) -> Kernel {
        let mut content = self.0;
        let start = usize::try_from(DATA - BASE).expect("a small number");
        assert!(content.len() <= start, "there is no room for so many instructions");
        content.resize(start, 0xf4);
        content.extend(data);
        Kernel::new(&content)
    }
}

/// The bytes of [`Code::cannot_be_emulated`]'s last instruction.
pub(crate) const CANNOT_BE_EMULATED: [u8; 5] = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];

/// A kernel's file.
pub(crate) struct Kernel {
    path: PathBuf,
    folder: Rc<TempDir>,
}

impl Kernel {
    fn new(content: &[u8]) -> Self {
        let size = content.len() as u64;
        let segment = Segment { address: BASE.into(), in_file: size, in_memory: size };
        let elf = Elf { class: 2, entry: BASE.into(), segments: &[segment], content, behind: &[] };
        let folder = tempfile::tempdir().expect("there is room for files");
        let path = folder.path().join("kernel");
        fs::write(&path, elf.bytes()).expect("there is room for files");
        Self { path, folder: Rc::new(folder) }
    }

    /// A machine for it.
    pub(crate) fn vmm(&self, arguments: &[&str]) -> Vmm {
        Vmm::of_kernel(&self.path, arguments).arg("--mem").arg("32M").with(&self.folder)
    }

    /// Starts it with `input` at its serial port.
    pub(crate) fn start(&self, arguments: &[&str], input: &str) -> Running {
        let mut running = self.vmm(arguments).spawn();
        running.send(input);
        running
    }

    /// Runs it to its end, with `input` and nothing more at its serial port.
    pub(crate) fn run(&self, arguments: &[&str], input: &str) -> Ended {
        let mut running = self.start(arguments, input);
        running.close_input();
        running.wait()
    }
}

/// A kernel that writes `>` and then does what the bytes at its serial port say: each of `verbs` is a byte and what it
/// has done; any other byte is echoed.
pub(crate) fn puppet(verbs: &[(u8, Code)]) -> Kernel {
    let mut code = Code::default().out(SERIAL, b'>');
    let start = code.0.len();
    // in al, dx; test al, 1; jz to the in; then read the byte.
    code = code.port(LINE_STATUS).bytes(&[0xec, 0xa8, 1, 0x74, 0xfb]).port(SERIAL).bytes(&[0xec]);
    for (verb, verb_code) in verbs {
        // cmp al, verb; jne over its code, which ends with a jump back.
        let body = verb_code.clone().0;
        let back = 5;
        let over = i32::try_from(body.len() + back).expect("a short verb");
        code = code.bytes(&[0x3c, *verb, 0x0f, 0x85]).bytes(&over.to_le_bytes()).bytes(&body);
        code = code.jump_to(start);
    }
    code.bytes(&[0xee]).jump_to(start).kernel(&[])
}

impl Code {
    /// `jmp` to the instruction at `target`.
    fn jump_to(self, target: usize) -> Self {
        let next = i32::try_from(self.0.len() + 5).expect("few instructions");
        let offset = i32::try_from(target).expect("few instructions") - next;
        self.bytes(&[0xe9]).bytes(&offset.to_le_bytes())
    }
}
