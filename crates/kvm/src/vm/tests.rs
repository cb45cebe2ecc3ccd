//! Doorbells on the machine's own KVM.

use std::path::Path;

use kvm_bindings::kvm_regs;
use memory::MemorySpec;
use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

/// Where the tiny guest's code lies, and the base of its data segment, where no RAM is.
const CODE: u64 = 0x1000;
const DATA: u64 = layout::PCI_BARS32.start;
const PORT: u16 = 0x510;

/// A machine of one processor in real mode, at `code`.
fn machine(code: &[u8]) -> (Vm, kvm_ioctls::VcpuFd) {
    let host = Host::open(Path::new(Host::DEVICE)).expect("KVM's device");
    let ram = MemorySpec::default().map().unwrap();
    ram.write_slice(code, GuestAddress(CODE)).unwrap();
    let vm = Vm::new(&host, &ram).unwrap();
    let vcpu = vm.fd.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    sregs.ds.base = DATA;
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs { rip: CODE, rdx: PORT.into(), rax: 5, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).unwrap();
    (vm, vcpu)
}

fn bell() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

#[test]
fn a_doorbell_takes_the_writes_that_it_is_for_and_no_others() {
    let code = [
        0xee, // out dx, al: the byte that is waited for
        0xef, // out dx, ax: another width
        0xa3, 0x00, 0x01, // mov [0x100], ax: anything is waited for
        0x66, 0xa3, 0x00, 0x01, // mov [0x100], eax
        0x66, 0xa3, 0x00, 0x02, // mov [0x200], eax: the value that is waited for
        0xa3, 0x00, 0x02, // mov [0x200], ax: another width
        0x40, // inc ax
        0x66, 0xa3, 0x00, 0x02, // mov [0x200], eax: another value
        0xee, // out dx, al: another value
    ];
    let (vm, mut vcpu) = machine(&code);
    let bells = [bell(), bell(), bell()];
    let doorbells = [
        Doorbell { at: Place::Port(PORT), value: Value::U8(5) },
        Doorbell { at: Place::Memory(DATA + 0x100), value: Value::Any },
        Doorbell { at: Place::Memory(DATA + 0x200), value: Value::U32(5) },
    ];
    for (doorbell, bell) in doorbells.into_iter().zip(&bells) {
        vm.connect_doorbell(doorbell, bell).unwrap();
    }
    let mut exits = Vec::new();
    while exits.len() < 4 {
        exits.push(match vcpu.run().unwrap() {
            kvm_ioctls::VcpuExit::IoOut(port, data) => (u64::from(port), data.to_vec()),
            kvm_ioctls::VcpuExit::MmioWrite(address, data) => (address, data.to_vec()),
            other => panic!("{other:?}"),
        });
    }
    let port = u64::from(PORT);
    let expected = [(port, vec![5, 0]), (DATA + 0x200, vec![5, 0]), (DATA + 0x200, vec![6, 0, 0, 0]), (port, vec![6])];
    assert_eq!(exits, expected);
    assert_eq!(bells.map(|bell| bell.read().unwrap()), [1, 2, 1]);
}

#[test]
fn a_second_doorbell_for_the_same_write_is_refused_with_its_address() {
    let (vm, _vcpu) = machine(&[]);
    let doorbell = Doorbell { at: Place::Memory(DATA), value: Value::U64(1) };
    vm.connect_doorbell(doorbell, &bell()).unwrap();
    let error = vm.connect_doorbell(doorbell, &bell()).unwrap_err().to_string();
    assert!(error.contains("c0000000"), "{error}");
    vm.connect_doorbell(Doorbell { at: Place::Memory(DATA), value: Value::U16(1) }, &bell()).unwrap();
}
