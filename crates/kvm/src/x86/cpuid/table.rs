//! The table of CPU features: where each stands in CPUID, and what depends on it.
//!
//! The names are those that Linux prints as flags in /proc/cpuinfo (arch/x86/include/asm/cpufeatures.h of 6.12), as far
//! as they are bits of CPUID that a KVM may offer or a user may look for. A few bits that Linux does not print are
//! named as its sources name them, because they depend on one that has a name. Dependencies follow its cpuid-deps.c,
//! with more of them for the vector extensions, since programs test for the newest and assume what came before.
//!
//! Left out on purpose: flags that Linux derives (`rep_good`, `nopl`, `tsc_known_freq`), groups of features, processor
//! models, and the paravirtual features of leaf 0x40000001.

#[derive(Debug, Clone, Copy)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Leaf, subleaf, register, and the names of its bits from bit 0 up, parted by single spaces. Where one bit stands for
/// two features the names are joined by `|`.
#[derive(Clone, Copy)]
pub(super) struct Word(pub(super) u32, pub(super) u32, pub(super) Register, pub(super) &'static str);

/// Stands for a bit that no flag is named after, or that KVM computes from the guest's CR4 (osxsave, ospke).
pub(super) const UNNAMED: &str = "-";

pub(super) const WORDS: [Word; 16] = [
    Word(
        0x1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov \
         pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    Word(
        0x1,
        0,
        Register::Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm \
         - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave - avx f16c rdrand hypervisor",
    ),
    Word(0x6, 0, Register::Eax, "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req"),
    Word(
        0x7,
        0,
        Register::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a \
         avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni \
         avx512bw avx512vl",
    ),
    Word(
        0x7,
        0,
        Register::Ecx,
        "- avx512vbmi umip pku - waitpkg avx512_vbmi2 user_shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc",
    ),
    Word(
        0x7,
        0,
        Register::Edx,
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect - md_clear - - - serialize - \
         tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 ibrs|ibpb stibp flush_l1d \
         arch_capabilities - ssbd",
    ),
    Word(
        0x7,
        1,
        Register::Eax,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - \
         - fred lkgs wrmsrns - amx_fp16 - avx_ifma - - lam",
    ),
    Word(
        0x7,
        1,
        Register::Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - - avx10 - apx",
    ),
    Word(0xd, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    Word(
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
         fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    Word(
        0x8000_0001,
        0,
        Register::Edx,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    Word(0x8000_0007, 0, Register::Ebx, "overflow_recov succor - smca"),
    Word(0x8000_0007, 0, Register::Edx, "- - - - - - - hw_pstate constant_tsc|nonstop_tsc cpb - proc_feedback"),
    Word(
        0x8000_0008,
        0,
        Register::Ebx,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp \
         - - - - - - - amd_ppin ssbd virt_ssbd - cppc - - - brs",
    ),
    Word(
        0x8000_000a,
        0,
        Register::Edx,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - pfthreshold \
         avic - v_vmsave_vmload vgif - x2avic - v_spec_ctrl - - - - vnmi",
    ),
    Word(0x8000_0022, 0, Register::Eax, "perfmon_v2 amd_lbr_v2"),
];

/// Leaf 0x80000001, EDX: bits that AMD repeats from leaf 1.
pub(super) const REPEATED_BY_AMD: u32 = 0x0183_f3ff;

/// A feature, and those that are of no use without it.
pub(super) const DEPENDANTS: &[(Feature, Set)] = &[
    (at("fpu"), set("fxsr")),
    (at("apic"), set("x2apic tsc_deadline_timer")),
    (at("fxsr"), set("cmov mmx fxsr_opt xsave sse")),
    (at("mmx"), set("mmxext 3dnow")),
    (at("3dnow"), set("3dnowext")),
    (at("sse"), set("sse2 misalignsse")),
    (at("sse2"), set("pni ssse3 sse4_1 sse4_2 sse4a aes pclmulqdq sha_ni gfni avx")),
    (at("xsave"), set("xsaveopt xsavec xgetbv1 xsaves xsaveerptr avx pku mpx apx")),
    (at("xsaves"), set("enqcmd xfd user_shstk")),
    (at("xgetbv1"), set("xfd")),
    (at("xfd"), set("amx_tile")),
    (at("amx_tile"), set("amx_bf16 amx_int8 amx_fp16 amx_complex")),
    (at("aes"), set("vaes")),
    (at("pclmulqdq"), set("vpclmulqdq")),
    (at("avx"), set("avx2 fma f16c fma4 xop vaes vpclmulqdq avx_ne_convert")),
    (at("avx2"), set("avx512f avx_vnni avx_vnni_int8 avx_vnni_int16 avx_ifma sha512 sm3 sm4")),
    (
        at("avx512f"),
        set("avx512ifma avx512pf avx512er avx512cd avx512dq avx512bw avx512vl avx512vbmi \
             avx512_4vnniw avx512_4fmaps avx512_vpopcntdq avx10"),
    ),
    (at("avx512vl"), set("avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vp2intersect avx512_bf16")),
    (at("avx512bw"), set("avx512_fp16")),
    (at("rtm"), set("tsxldtrk")),
    (at("lkgs"), set("fred")),
    (at("sgx"), set("sgx_lc")),
    (
        at("svm"),
        set("npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists pausefilter pfthreshold avic \
             v_vmsave_vmload vgif x2avic v_spec_ctrl vnmi"),
    ),
];

/// Leaves that describe one feature and vanish with it.
pub(super) const LEAVES: &[(u32, Feature)] = &[
    (0x12, at("sgx")),
    (0x14, at("intel_pt")),
    (0x1d, at("amx_tile")),
    (0x1e, at("amx_tile")),
    (0x24, at("avx10")),
    (0x8000_000a, at("svm")),
    (0x8000_001d, at("topoext")),
    (0x8000_001e, at("topoext")),
];

/// One bit of [`WORDS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Feature {
    pub(super) word: usize,
    pub(super) bit: u32,
}

/// Any bits of [`WORDS`].
pub(super) type Set = [u32; WORDS.len()];

/// The bit of this name, found by the compiler: a name that the table lacks does not compile.
pub(super) const fn at(name: &str) -> Feature {
    find(name.as_bytes(), 0, name.len())
}

/// The bits of these names, parted by single spaces.
const fn set(names: &str) -> Set {
    let names = names.as_bytes();
    let mut set = [0; WORDS.len()];
    let mut start = 0;
    while start < names.len() {
        let end = end_of_name(names, start);
        let feature = find(names, start, end);
        set[feature.word] |= 1 << feature.bit;
        start = end + 1;
    }
    set
}

/// The first bit of the name that stands at `start..end` of `list`.
const fn find(list: &[u8], start: usize, end: usize) -> Feature {
    let mut word = 0;
    while word < WORDS.len() {
        let names = WORDS[word].3.as_bytes();
        let (mut from, mut bit) = (0, 0);
        while from < names.len() {
            let to = end_of_name(names, from);
            let mut same = 0;
            while to - from == end - start && same < end - start && names[from + same] == list[start + same] {
                same += 1;
            }
            if same == end - start {
                return Feature { word, bit };
            }
            from = to + 1;
            bit += 1;
        }
        word += 1;
    }
    panic!("the table has no feature of this name")
}

const fn end_of_name(names: &[u8], start: usize) -> usize {
    let mut end = start;
    while end < names.len() && names[end] != b' ' {
        end += 1;
    }
    end
}
