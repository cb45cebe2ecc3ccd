//! The init of a guest that does as little as a guest can: it says that user space is reached, if it was compiled with
//! `--cfg mark` (the byte 0x7b to I/O port 0x500, which `vmm --boot-timer` looks for), and reboots.
//!
//! `xtask` has rustc compile it as it stands, without Cargo and without a standard library, whose start would be measured
//! too. System calls: reboot(2), ioperm(2).

#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "without a standard library, system calls and the port write are made by hand")]

use core::arch::asm;

const IOPERM: u64 = 173;
const REBOOT: u64 = 169;
const MAGIC: [u64; 3] = [0xfee1_dead, 0x2812_1969, 0x0123_4567];

#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    if cfg!(mark) && system_call(IOPERM, [0x500, 1, 1]) == 0 {
        // SAFETY: ioperm has just allowed this port, and no memory is touched.
        unsafe { asm!("out dx, al", in("dx") 0x500_u16, in("al") 0x7b_u8, options(nomem, nostack)) };
    }
    // Were it ever to return, the kernel would panic over a lost init, and reboot too.
    loop {
        system_call(REBOOT, MAGIC);
    }
}

fn system_call(number: u64, arguments: [u64; 3]) -> u64 {
    let result;
    // SAFETY: neither of the two system calls touches our memory; `syscall` itself changes rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
