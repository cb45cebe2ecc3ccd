//! Images of every kind, good and bad, into guest memory.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::testing::*;
use super::unpack::Format;
use super::{Entry, EntryChoice, ImageFault, Kaslr, KaslrSeed, LoadOptions};
use crate::cache::{Cache, Key};

const FORMATS: [Format; 7] =
    [Format::Gzip, Format::Bzip2, Format::Lzma, Format::Xz, Format::Lz4, Format::Zstd, Format::Lzo];
const SEED: KaslrSeed = KaslrSeed { physical: 3, virtual_: 5 };

fn with_kaslr() -> LoadOptions<'static> {
    LoadOptions { kaslr: Some(SEED), ..LoadOptions::default() }
}

fn entering(entry: EntryChoice) -> LoadOptions<'static> {
    LoadOptions { entry, ..LoadOptions::default() }
}

/// The lower half of the linked virtual address of a place in the kernel.
fn place(offset: u64) -> u32 {
    u32::try_from(0x8000_0000 + LINKED + offset).unwrap()
}

fn assert_segments(memory: &memory::Ram, base: u64) {
    let expected: Vec<u8> = (0..0x2000).map(content).collect();
    assert_eq!(guest_bytes(memory, base, 0x1000), expected[..0x1000]);
    assert_eq!(guest_bytes(memory, base + DATA - LINKED, 0x1000), expected[0x1000..]);
    assert_eq!(guest_bytes(memory, base + DATA - LINKED + 0x1000, 0x3000), vec![0; 0x3000]);
}

#[test]
fn a_vmlinux_is_placed_where_it_is_linked() {
    let memory = memory(64);
    let kernel = load(&TestElf::new().bytes(), &memory, &with_kaslr()).unwrap();
    assert_eq!(kernel.entry, Entry::Linux64 { rip: GuestAddress(ENTRY) });
    assert_eq!(kernel.extent, LINKED..LINKED_END);
    assert_eq!(kernel.kaslr, None, "without relocations it cannot be moved");
    assert_eq!(kernel.cmdline_limit, 2047);
    assert!(kernel.setup_header.is_none());
    assert!(kernel.initrd.is_empty());
    assert_segments(&memory, LINKED);
}

#[test]
fn every_format_unpacks_to_the_same_kernel() {
    let kernel = TestElf::new().bytes();
    for format in FORMATS {
        let memory = memory(64);
        let image = TestBzImage::packed(format, &kernel).bytes();
        let loaded = load(&image, &memory, &LoadOptions::default()).unwrap();
        assert_eq!(loaded.entry, Entry::Linux64 { rip: GuestAddress(ENTRY) }, "{format:?}");
        assert_eq!({ loaded.setup_header.unwrap().version }, 0x020f);
        assert_segments(&memory, LINKED);
    }
}

#[test]
fn a_bzimage_gives_its_elf_file_back() {
    let kernel = TestElf::with_relocations(&[&[place(8)], &[place(16)]]).bytes();
    let image = TestBzImage::packed(Format::Zstd, &kernel).bytes();
    assert_eq!(super::unpack_vmlinux(Path::new("image"), &file(&image)).unwrap(), kernel);
}

#[test]
fn a_zstd_window_of_128_mib_is_accepted() {
    let kernel = TestElf::new().bytes();
    // Magic, no flags, a window of 2 to the 17 plus 10, one raw block, which is the last.
    let mut packed = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 17 << 3];
    packed.extend(&(u32::try_from(kernel.len()).unwrap() << 3 | 1).to_le_bytes()[..3]);
    packed.extend(&kernel);
    let image = TestBzImage::new(with_size(packed, kernel.len())).bytes();
    let memory = memory(64);
    load(&image, &memory, &LoadOptions::default()).unwrap();
    assert_segments(&memory, LINKED);
}

#[test]
fn a_file_with_holes_is_read_as_if_it_had_none() {
    // The second segment: a hole, data, a hole.
    let mut elf = TestElf::new();
    elf.segments[1].offset = 0x10_0000.into();
    elf.segments[1].filesz = 0x30_0000.into();
    elf.segments[1].memsz = 0x30_0000.into();
    let file = file(&elf.bytes());
    file.write_all_at(&[7; 0x1_0000], 0x20_0000).unwrap();
    file.set_len(0x40_0000).unwrap();
    let memory = memory(64);
    super::load(Path::new("image"), &file, &memory, &LoadOptions::default()).unwrap();
    let found = guest_bytes(&memory, DATA, 0x30_0000);
    assert!(found[..0x10_0000].iter().all(|&byte| byte == 0));
    assert!(found[0x10_0000..0x11_0000].iter().all(|&byte| byte == 7));
    assert!(found[0x11_0000..].iter().all(|&byte| byte == 0));
}

#[test]
fn three_relocation_lists_are_applied() {
    // In the file: 64-bit places, inverse ones, 32-bit ones.
    let elf = TestElf::with_relocations(&[&[place(0x10)], &[place(0x20)], &[place(0x30), place(0x34)]]);
    let memory = memory(512);
    let kernel = load(&elf.bytes(), &memory, &with_kaslr()).unwrap();
    let Kaslr { virtual_base, physical_base } = kernel.kaslr.unwrap();
    assert_eq!(virtual_base, 0xffff_ffff_8100_0000 + 5 * 0x20_0000);
    assert_eq!(physical_base, LINKED + 3 * 0x20_0000);
    assert_eq!(kernel.entry, Entry::Linux64 { rip: GuestAddress(ENTRY + 3 * 0x20_0000) });
    assert_eq!(kernel.extent, physical_base..physical_base + (LINKED_END - LINKED));

    let expected: Vec<u8> = (0..0x1000).map(content).collect();
    let found = guest_bytes(&memory, physical_base, 0x1000);
    let long = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let short = |bytes: &[u8]| u32::from_le_bytes(bytes[..4].try_into().unwrap());
    let offset = 5 * 0x20_0000;
    assert_eq!(long(&found[0x10..]), long(&expected[0x10..]) + u64::from(offset));
    assert_eq!(short(&found[0x20..]), short(&expected[0x20..]) - offset);
    assert_eq!(short(&found[0x30..]), short(&expected[0x30..]) + offset);
    assert_eq!(short(&found[0x34..]), short(&expected[0x34..]) + offset);
    assert_eq!(found[..0x10], expected[..0x10]);
    assert_eq!(found[0x38..], expected[0x38..]);
}

#[test]
fn two_relocation_lists_are_applied() {
    let elf = TestElf::with_relocations(&[&[place(0x10)], &[place(0x30)]]);
    let memory = memory(512);
    let kernel = load(&elf.bytes(), &memory, &with_kaslr()).unwrap();
    let base = kernel.kaslr.unwrap().physical_base;
    let expected: Vec<u8> = (0..0x1000).map(content).collect();
    let found = guest_bytes(&memory, base, 0x1000);
    let long = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(long(&found[0x10..]), long(&expected[0x10..]) + 5 * 0x20_0000);
    assert_eq!(found[0x18..0x30], expected[0x18..0x30]);
    assert_ne!(found[0x30..0x34], expected[0x30..0x34]);
}

#[test]
fn nokaslr_leaves_a_relocatable_kernel_where_it_is_linked() {
    let elf = TestElf::with_relocations(&[&[place(0x10)], &[place(0x30)]]);
    let memory = memory(512);
    let kernel = load(&elf.bytes(), &memory, &LoadOptions::default()).unwrap();
    assert_eq!(kernel.kaslr, None);
    assert_segments(&memory, LINKED);
}

#[test]
fn pvh_is_entered_when_asked_for_and_is_not_moved() {
    let elf = TestElf::with_relocations(&[&[place(0x10)], &[place(0x30)]]);
    let memory = memory(512);
    let options = LoadOptions { entry: EntryChoice::Pvh, ..with_kaslr() };
    let kernel = load(&elf.bytes(), &memory, &options).unwrap();
    assert_eq!(kernel.entry, Entry::Pvh { eip: PVH_ENTRY });
    assert_eq!(kernel.kaslr, None);
    assert_segments(&memory, LINKED);
}

#[test]
fn pvh_is_entered_where_there_is_no_other_entry() {
    let mut elf = TestElf::new();
    elf.header.entry = 0.into();
    let kernel = load(&elf.bytes(), &memory(64), &LoadOptions::default()).unwrap();
    assert_eq!(kernel.entry, Entry::Pvh { eip: PVH_ENTRY });
}

#[test]
fn the_initrd_gets_the_top_of_memory() {
    let options = LoadOptions { initrd_len: 5000, ..with_kaslr() };
    let kernel = load(&TestElf::new().bytes(), &memory(64), &options).unwrap();
    assert_eq!(kernel.initrd, (64 << 20) - 8192..(64 << 20) - 8192 + 5000);
}

#[test]
fn the_initrd_stays_below_the_limit_of_an_old_kernel() {
    let mut image = TestBzImage::packed(Format::Lz4, &TestElf::new().bytes());
    image.header.xloadflags = 1;
    image.header.initrd_addr_max = 0x37ff_ffff;
    let options = LoadOptions { initrd_len: 4096, ..LoadOptions::default() };
    let kernel = load(&image.bytes(), &memory(2048), &options).unwrap();
    assert_eq!(kernel.initrd.end, 0x3800_0000);
}

#[test]
fn an_unknown_format_unpacks_itself() {
    let payload = b"a payload of the future 1234".to_vec();
    let memory = memory(64);
    let mut image = TestBzImage::new(payload.clone());
    image.header.init_size = 3 << 20;
    let kernel = load(&image.bytes(), &memory, &with_kaslr()).unwrap();
    assert_eq!(kernel.entry, Entry::Linux64 { rip: GuestAddress(LINKED + 0x200) });
    assert_eq!(kernel.extent, LINKED..LINKED + (3 << 20));
    assert_eq!(kernel.kaslr, None, "it does that itself");
    assert_eq!(guest_bytes(&memory, LINKED + 0x200, 4), [0x90; 4]);
    assert_eq!(guest_bytes(&memory, LINKED + CODE_HEAD as u64, payload.len()), payload);
}

#[test]
fn a_payload_without_an_elf_file_unpacks_itself() {
    let image = TestBzImage::packed(Format::Gzip, b"no ELF file").bytes();
    let kernel = load(&image, &memory(64), &LoadOptions::default()).unwrap();
    assert_eq!(kernel.entry, Entry::Linux64 { rip: GuestAddress(LINKED + 0x200) });
}

#[test]
fn a_bzimage_unpacks_itself_when_asked_to() {
    let image = TestBzImage::packed(Format::Gzip, &TestElf::new().bytes()).bytes();
    let kernel = load(&image, &memory(64), &entering(EntryChoice::Unpack)).unwrap();
    assert_eq!(kernel.entry, Entry::Linux64 { rip: GuestAddress(LINKED + 0x200) });
}

// Bad images.

#[test]
fn a_missing_file_is_refused() {
    let error = super::open(Path::new("/nonexistent/vmlinuz")).unwrap_err();
    assert!(matches!(error.fault, ImageFault::Open(_)));
    assert!(error.to_string().contains("/nonexistent/vmlinuz"));
}

#[test]
fn a_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = super::open(dir.path()).unwrap();
    let error = super::load(dir.path(), &file, &memory(64), &LoadOptions::default()).unwrap_err();
    assert!(matches!(error.fault, ImageFault::Directory));
}

#[test]
fn a_device_is_refused() {
    let path = Path::new("/dev/null");
    let error = super::load(path, &super::open(path).unwrap(), &memory(64), &LoadOptions::default()).unwrap_err();
    assert!(matches!(error.fault, ImageFault::NotAFile));
}

#[test]
fn an_empty_file_is_refused() {
    assert!(matches!(fault(b""), ImageFault::Empty));
}

#[test]
fn a_text_file_is_refused() {
    let fault = fault("console=ttyS0\n".repeat(400).as_bytes());
    assert!(matches!(fault, ImageFault::NotAKernel));
    assert_eq!(
        sentence(fault),
        "Cannot boot the kernel image image: it is neither a bzImage nor an ELF vmlinux; \
         name an x86-64 Linux kernel, such as /boot/vmlinuz-VERSION"
    );
}

#[test]
fn a_truncated_bzimage_is_refused() {
    let image = TestBzImage::packed(Format::Zstd, &TestElf::new().bytes()).bytes();
    for len in [0x230, 1024, image.len() / 2, image.len() - 16] {
        assert!(matches!(fault(&image[..len]), ImageFault::Truncated { .. }), "{len}");
    }
}

#[test]
fn a_truncated_vmlinux_is_refused() {
    let elf = TestElf::new().bytes();
    for len in [32, 100, elf.len() - 1] {
        assert!(matches!(fault(&elf[..len]), ImageFault::Truncated { .. }), "{len}");
    }
}

#[test]
fn a_damaged_payload_is_refused() {
    // What every format notices: the second half is overwritten.
    for format in FORMATS {
        let mut image = TestBzImage::packed(format, &TestElf::new().bytes());
        let middle = image.payload.len() / 2;
        let end = image.payload.len() - 4;
        image.payload[middle..end].fill(0xff);
        let fault = fault(&image.bytes());
        assert!(matches!(fault, ImageFault::Damaged { .. } | ImageFault::Overlong(_)), "{format:?}: {fault}");
    }
}

#[test]
fn a_flipped_bit_is_noticed_where_there_is_a_check_sum() {
    for format in [Format::Gzip, Format::Bzip2, Format::Xz] {
        let mut image = TestBzImage::packed(format, &TestElf::new().bytes());
        let middle = image.payload.len() / 2;
        image.payload[middle] ^= 1;
        let fault = fault(&image.bytes());
        // Damaged tables may also make more of it, before the check sum is reached.
        let is_refused = matches!(fault, ImageFault::Damaged { .. } | ImageFault::Overlong(_));
        assert!(is_refused, "{format:?}: {fault}");
    }
}

#[test]
fn a_payload_that_unpacks_to_more_than_it_says_is_refused() {
    let kernel = TestElf::new().bytes();
    for format in FORMATS {
        if format == Format::Gzip {
            continue;
        }
        let image = TestBzImage::new(with_size(pack(format, &kernel), kernel.len() - 1)).bytes();
        let fault = fault(&image);
        assert!(matches!(fault, ImageFault::Overlong(_)), "{format:?}: {fault}");
    }
    // In gzip the size is the format's own.
    let mut packed = pack(Format::Gzip, &kernel);
    let at = packed.len() - 4;
    packed[at..].copy_from_slice(&u32::try_from(kernel.len() - 1).unwrap().to_le_bytes());
    let fault = fault(&TestBzImage::new(packed).bytes());
    assert!(matches!(fault, ImageFault::Damaged { .. } | ImageFault::Overlong(_)), "{fault}");
}

#[test]
fn a_payload_that_unpacks_to_less_than_it_says_is_refused() {
    let kernel = TestElf::new().bytes();
    for format in FORMATS {
        if format == Format::Gzip {
            continue;
        }
        let image = TestBzImage::new(with_size(pack(format, &kernel), kernel.len() + 1)).bytes();
        let fault = fault(&image);
        assert!(matches!(fault, ImageFault::Damaged { .. }), "{format:?}: {fault}");
    }
}

#[test]
fn a_payload_that_announces_more_than_a_kernel_has_is_refused() {
    let image = TestBzImage::new(with_size(pack(Format::Xz, b"kernel"), (1 << 30) + 1)).bytes();
    assert!(matches!(fault(&image), ImageFault::Oversized(_)));
}

#[test]
fn an_arm64_image_is_refused() {
    let mut image = vec![0; 4096];
    image[56..60].copy_from_slice(b"ARM\x64");
    let fault = fault(&image);
    assert!(matches!(fault, ImageFault::Arm64));
    assert!(sentence(fault).contains("arm64"));
}

#[test]
fn a_32_bit_elf_file_is_refused() {
    let mut elf = TestElf::new();
    elf.header.ident[4] = 1;
    let fault = fault(&elf.bytes());
    assert!(matches!(fault, ImageFault::ForeignElf("it has 32 bits")));
}

#[test]
fn an_elf_file_for_another_machine_is_refused() {
    let mut elf = TestElf::new();
    elf.header.machine = 183.into();
    assert!(matches!(fault(&elf.bytes()), ImageFault::ForeignElf(_)));
}

#[test]
fn a_32_bit_bzimage_is_refused() {
    let mut image = TestBzImage::new(b"unknown payload".to_vec());
    image.header.xloadflags = 0;
    assert!(matches!(fault(&image.bytes()), ImageFault::CannotUnpack));
    let mut image = TestBzImage::new(b"unknown payload".to_vec());
    image.header.version = 0x0204;
    assert!(matches!(fault(&image.bytes()), ImageFault::No64BitEntry));
}

#[test]
fn an_object_file_is_refused() {
    let mut elf = TestElf::new();
    elf.header.kind = 1.into();
    assert!(matches!(fault(&elf.bytes()), ImageFault::ForeignElf(_)));
    let mut elf = TestElf::new();
    elf.segments.clear();
    assert!(matches!(fault(&elf.bytes()), ImageFault::NoSegments));
}

#[test]
fn segments_that_overlap_are_refused() {
    let mut elf = TestElf::new();
    elf.segments[1].paddr = (LINKED + 0xfff).into();
    assert!(matches!(fault(&elf.bytes()), ImageFault::SegmentsOverlap(_)));
}

#[test]
fn a_segment_that_wraps_is_refused() {
    let mut elf = TestElf::new();
    elf.segments[1].paddr = (u64::MAX - 0x1000).into();
    assert!(matches!(fault(&elf.bytes()), ImageFault::SegmentWraps(_)));
    let mut elf = TestElf::new();
    elf.segments[1].offset = (u64::MAX - 0x100).into();
    assert!(matches!(fault(&elf.bytes()), ImageFault::SegmentWraps(_)));
    let mut elf = TestElf::new();
    elf.segments[1].memsz = 1.into();
    assert!(matches!(fault(&elf.bytes()), ImageFault::SegmentWraps(_)));
}

#[test]
fn a_segment_outside_of_what_a_kernel_may_have_is_refused() {
    for address in [0, 0x1000, 1 << 30, 1 << 40] {
        let mut elf = TestElf::new();
        elf.segments[1].paddr = address.into();
        assert!(matches!(fault(&elf.bytes()), ImageFault::SegmentOutside(found) if found == address));
    }
}

#[test]
fn a_segment_beyond_the_memory_names_the_least_that_will_do() {
    let mut elf = TestElf::new();
    elf.segments[1].paddr = (100 << 20).into();
    let fault = fault(&elf.bytes());
    assert!(matches!(fault, ImageFault::MemoryTooSmall { minimum_mib: 122, memory_mib: 64 }), "{fault}");
    assert!(sentence(fault).contains("--mem 122M"));
}

#[test]
fn an_initrd_that_does_not_fit_beside_the_kernel_names_the_least_that_will_do() {
    let options = LoadOptions { initrd_len: 60 << 20, ..with_kaslr() };
    let fault = load(&TestElf::new().bytes(), &memory(64), &options).unwrap_err();
    let ImageFault::MemoryTooSmall { minimum_mib, memory_mib: 64 } = fault else { panic!("{fault}") };
    assert!(load(&TestElf::new().bytes(), &memory(minimum_mib), &options).is_ok(), "{minimum_mib}");
    let fault = load(&TestElf::new().bytes(), &memory(minimum_mib - 1), &options).unwrap_err();
    assert!(matches!(fault, ImageFault::MemoryTooSmall { .. }));
}

#[test]
fn a_relocation_that_points_outside_is_refused() {
    let end = LINKED_END - LINKED;
    for entry in [place(end), place(end - 7), place(0) - 1, 1, u32::MAX] {
        let elf = TestElf::with_relocations(&[&[place(0x10)], &[entry]]);
        assert!(matches!(fault(&elf.bytes()), ImageFault::RelocationOutside(_)), "{entry:#x}");
    }
}

#[test]
fn relocations_that_are_no_lists_are_refused() {
    let one = TestElf::with_relocations(&[&[place(0x10)]]);
    assert!(matches!(fault(&one.bytes()), ImageFault::RelocationLists));
    let four = TestElf::with_relocations(&[&[place(0x10)], &[], &[], &[]]);
    assert!(matches!(fault(&four.bytes()), ImageFault::RelocationLists));
    let mut odd = TestElf::with_relocations(&[&[place(0x10)], &[]]);
    odd.tail.push(0);
    assert!(matches!(fault(&odd.bytes()), ImageFault::RelocationLists));
    let mut unled = TestElf::with_relocations(&[&[place(0x10)], &[]]);
    unled.tail.drain(..4);
    assert!(matches!(fault(&unled.bytes()), ImageFault::RelocationLists));
}

#[test]
fn an_entry_outside_of_the_segments_is_refused() {
    let mut elf = TestElf::new();
    elf.header.entry = 0x1234.into();
    elf.segments.pop();
    assert!(matches!(fault(&elf.bytes()), ImageFault::NoEntry(0x1234)));
}

#[test]
fn an_entry_that_the_image_does_not_have_is_refused() {
    let mut elf = TestElf::new();
    elf.segments.pop();
    let found = load(&elf.bytes(), &memory(64), &entering(EntryChoice::Pvh)).unwrap_err();
    assert!(matches!(found, ImageFault::NoPvhEntry));
    let found = load(&TestElf::new().bytes(), &memory(64), &entering(EntryChoice::Unpack)).unwrap_err();
    assert!(matches!(found, ImageFault::NotABzImage));
    let image = TestBzImage::new(b"unknown payload".to_vec()).bytes();
    let found = load(&image, &memory(64), &entering(EntryChoice::Linux64)).unwrap_err();
    assert!(matches!(found, ImageFault::CannotUnpack));
}

// The cache.

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("kernels")).unwrap();
    (dir, cache)
}

#[test]
fn a_cached_kernel_is_loaded_as_if_it_were_unpacked() {
    let (_dir, cache) = cache();
    let elf = TestElf::with_relocations(&[&[place(0x10)], &[place(0x30)]]).bytes();
    let image = TestBzImage::packed(Format::Xz, &elf).bytes();
    let options = LoadOptions { cache: Some(&cache), ..with_kaslr() };
    let (first, second) = (memory(64), memory(64));
    let unpacked = load(&image, &first, &options).unwrap();
    assert!(cache.find(Key::of(&TestBzImage::packed(Format::Xz, &elf).payload)).is_some());
    let cached = load(&image, &second, &options).unwrap();
    assert_eq!(unpacked.kaslr, cached.kaslr);
    let len = usize::try_from(cached.extent.end - cached.extent.start).unwrap();
    assert_eq!(guest_bytes(&first, cached.extent.start, len), guest_bytes(&second, cached.extent.start, len));
}

#[test]
fn a_cached_kernel_is_not_unpacked_again() {
    let (_dir, cache) = cache();
    let image = TestBzImage::packed(Format::Xz, &TestElf::new().bytes());
    // Another kernel under its key shows where the kernel comes from.
    let mut other = TestElf::new();
    other.header.entry = (ENTRY + 4).into();
    cache.store(Key::of(&image.payload), &other.bytes());
    let options = LoadOptions { cache: Some(&cache), ..with_kaslr() };
    let kernel = load(&image.bytes(), &memory(64), &options).unwrap();
    assert_eq!(kernel.entry, Entry::Linux64 { rip: GuestAddress(ENTRY + 4) });
}

#[test]
fn a_damaged_cached_kernel_is_unpacked_again() {
    let (_dir, cache) = cache();
    let elf = TestElf::with_relocations(&[&[place(0x10)], &[place(0x30)]]);
    let image = TestBzImage::packed(Format::Xz, &elf.bytes());
    let key = Key::of(&image.payload);
    let outside = TestElf::with_relocations(&[&[1], &[place(0x30)]]);
    for damaged in [b"no ELF file".to_vec(), outside.bytes()] {
        cache.store(key, &damaged);
        let options = LoadOptions { cache: Some(&cache), ..with_kaslr() };
        let bytes = TestBzImage { header: image.header, payload: image.payload.clone() }.bytes();
        assert!(load(&bytes, &memory(64), &options).unwrap().kaslr.is_some());
        assert_eq!(cache.find(key).unwrap().len, 0x3000 + 16, "the entry is made anew");
    }
}

#[test]
fn a_cache_that_cannot_be_written_fails_no_boot() {
    let (dir, cache) = cache();
    fs::remove_dir(dir.path().join("kernels")).unwrap();
    let image = TestBzImage::packed(Format::Xz, &TestElf::new().bytes()).bytes();
    let options = LoadOptions { cache: Some(&cache), ..with_kaslr() };
    assert!(load(&image, &memory(64), &options).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Whatever is changed in a good image, it is loaded or refused; and what is loaded lies in memory.
    #[test]
    fn no_change_to_an_image_does_harm(
        kind in 0..=FORMATS.len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        in_headers in any::<bool>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
        entry in prop::sample::select(vec![EntryChoice::Auto, EntryChoice::Pvh, EntryChoice::Unpack]),
    ) {
        let elf = TestElf::with_relocations(&[&[place(0x10)], &[place(0x20)], &[place(0x30)]]).bytes();
        let mut image = match FORMATS.get(kind) {
            Some(&format) => TestBzImage::packed(format, &elf).bytes(),
            None => elf,
        };
        for (at, value) in changes {
            let at = if in_headers { (at.index(0x120) + if kind < FORMATS.len() { 0x1f1 } else { 0 }) % image.len() } else { at.index(image.len()) };
            image[at] = value;
        }
        if let Some(cut) = cut {
            image.truncate(cut.index(image.len()));
        }
        let options = LoadOptions { entry, initrd_len: 4096, ..with_kaslr() };
        if let Ok(kernel) = load(&image, &memory(64), &options) {
            prop_assert!(kernel.extent.end <= 64 << 20);
            prop_assert!(kernel.extent.end <= kernel.initrd.start || kernel.initrd.end <= kernel.extent.start);
        }
    }
}
