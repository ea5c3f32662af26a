//! Every byte layout: round trips, truncation at each byte, lies about lengths, and random damage.

mod common;

use bytes::Bytes;
use common::Dice;
use migrate_transport::{
    Encoding, PageFrame, Run, Section, VersionRange, codec,
    frame::{
        FrameError, MAX_ADDRESS, MAX_FRAME_DATA, MAX_RUN_PAGES, MAX_RUNS, MAX_SECTION, PageDecoder, PageEncoder, SectionDecoder,
        hello::{Answer, HELLO, Hello, Verdict},
        pages, section,
    },
    trust::PeerName,
};
use proptest::prelude::*;

fn encode(encoding: Encoding, runs: &[Run], data: Vec<Bytes>) -> Vec<u8> {
    let mut encoder = PageEncoder::default();
    encoder.set_encoding(encoding);
    encoder.encode(runs, data).unwrap().concat()
}

/// All frames of a stream that ends after these bytes, fed in pieces of this size.
fn decode(bytes: &[u8], piece: usize) -> Result<Vec<PageFrame>, FrameError> {
    let mut decoder = PageDecoder::default();
    let mut frames = Vec::new();
    for piece in bytes.chunks(piece) {
        decoder.push(Bytes::copy_from_slice(piece));
        while let Some(frame) = decoder.next_frame()? {
            frames.push(frame);
        }
    }
    decoder.end()?;
    Ok(frames)
}

fn sample(encoding: Encoding) -> Vec<u8> {
    let runs = [Run::new(3, 0x7000, 2, false).unwrap(), Run::new(3, 0x9000, 500, true).unwrap()];
    encode(encoding, &runs, vec![vec![42; 8192].into()])
}

#[test]
fn the_layout_is_the_one_drawn() {
    let run = Run::new(0x0102, 0x7fff_1234_5000, 1, true).unwrap();
    let bytes = encode(Encoding::Raw, &[run], vec![]);
    let mut drawn = b"MPG1\x01\x00\x00\x00".to_vec();
    drawn.extend([0; 8]);
    drawn.extend([2, 1, 0, 0, 1, 0, 0, 0, 0x01, 0x50, 0x34, 0x12, 0xff, 0x7f, 0, 0]);
    assert_eq!(bytes, drawn);
    let header = section::header(&Section::new(0x0102, 0x0304, vec![0; 5])).unwrap();
    assert_eq!(header[..], [2, 1, 4, 3, 5, 0, 0, 0]);
}

#[test]
fn a_frame_cut_anywhere_is_noticed() {
    for encoding in [Encoding::Raw, Encoding::Zstd] {
        let whole = sample(encoding);
        for len in 0..whole.len() {
            match decode(&whole[..len], 1000) {
                Ok(frames) => assert!(len == 0 && frames.is_empty()),
                Err(error) => assert_eq!(
                    error,
                    FrameError::Truncated {
                        what: "a page frame",
                        have: len as u64
                    }
                ),
            }
        }
        assert_eq!(
            decode(&whole, 1).unwrap(),
            decode(&whole, 7).unwrap().iter().map(rechunk).collect::<Vec<_>>()
        );
    }
}

/// Raw data comes in the chunks it was fed in.
fn rechunk(frame: &PageFrame) -> PageFrame {
    let data = if frame.data.len() == 1 {
        frame.data.clone()
    } else {
        frame.concat().into_iter().map(|byte| Bytes::copy_from_slice(&[byte])).collect()
    };
    PageFrame {
        runs: frame.runs.clone(),
        data,
    }
}

#[test]
fn a_section_cut_anywhere_is_noticed() {
    let sent = Section::new(1, 2, Dice(0).bytes(300));
    let whole = [&section::header(&sent).unwrap()[..], &sent.payload].concat();
    for len in 0..whole.len() {
        let mut decoder = SectionDecoder::default();
        decoder.push(Bytes::copy_from_slice(&whole[..len]));
        assert_eq!(decoder.next_section().unwrap(), None);
        assert_eq!(decoder.end().is_ok(), len == 0);
        decoder.push(Bytes::copy_from_slice(&whole[len..]));
        assert_eq!(decoder.next_section().unwrap().as_ref(), Some(&sent));
        assert!(decoder.end().is_ok());
    }
}

/// The sample frame with some of its header's bytes changed.
fn forged(encoding: Encoding, changes: &[(usize, &[u8])]) -> Result<Vec<PageFrame>, FrameError> {
    let mut bytes = sample(encoding);
    for (at, new) in changes {
        bytes[*at..*at + new.len()].copy_from_slice(new);
    }
    decode(&bytes, 4096)
}

#[test]
fn lies_are_refused_by_name() {
    let huge = u32::MAX.to_le_bytes();
    let one_more = (MAX_FRAME_DATA as u32 + 1).to_le_bytes();
    let raw = |changes: &[(usize, &[u8])]| forged(Encoding::Raw, changes).unwrap_err();
    assert!(matches!(raw(&[(0, b"GET ")]), FrameError::Magic { .. }));
    assert!(matches!(raw(&[(4, &[0, 0])]), FrameError::Field { .. }));
    assert!(matches!(raw(&[(4, &[0xff, 0xff])]), FrameError::TooLong { limit, .. } if limit == MAX_RUNS as u64));
    assert!(matches!(raw(&[(6, &[2])]), FrameError::Field { .. }));
    assert!(matches!(raw(&[(7, &[1])]), FrameError::Field { .. }));
    assert!(matches!(raw(&[(8, &huge), (12, &huge)]), FrameError::TooLong { .. }));
    assert!(matches!(raw(&[(8, &one_more), (12, &one_more)]), FrameError::TooLong { .. }));
    assert!(matches!(raw(&[(8, &huge)]), FrameError::Length { .. }));
    assert!(matches!(
        raw(&[(8, &4096u32.to_le_bytes()), (12, &4096u32.to_le_bytes())]),
        FrameError::Length { .. }
    ));
    // The first run: terabytes of pages; no pages; past the end; between pages.
    assert!(matches!(raw(&[(20, &huge)]), FrameError::TooLong { .. }));
    assert!(matches!(raw(&[(20, &[0; 4])]), FrameError::EmptyRun { .. }));
    assert!(matches!(
        raw(&[(24, &(u64::MAX - 4095).to_le_bytes())]),
        FrameError::BeyondAddressSpace { .. }
    ));
    assert!(matches!(
        raw(&[(24, &(MAX_ADDRESS - 4096).to_le_bytes())]),
        FrameError::BeyondAddressSpace { .. }
    ));
    for low in [2u64, 8, 0x800, 0xffe] {
        assert!(matches!(raw(&[(24, &(0x7000 | low).to_le_bytes())]), FrameError::Misaligned { .. }));
    }
    // The second run, onto the first one's last page, and onto its first from below.
    assert!(matches!(raw(&[(40, &0x8001u64.to_le_bytes())]), FrameError::Overlap { .. }));
    assert!(matches!(raw(&[(40, &0x6001u64.to_le_bytes())]), FrameError::Overlap { .. }));
    assert!(forged(Encoding::Raw, &[(32, &[9])]).is_ok(), "another address space is no overlap");
}

#[test]
fn compressed_data_must_be_what_the_runs_say() {
    let zstd = |changes: &[(usize, &[u8])]| forged(Encoding::Zstd, changes);
    assert!(zstd(&[]).is_ok());
    assert!(matches!(zstd(&[(8, &[0; 4])]).unwrap_err(), FrameError::TooLong { .. }));
    assert!(matches!(
        zstd(&[(8, &8192u32.to_le_bytes())]).unwrap_err(),
        FrameError::TooLong { .. }
    ));
    // Fewer or more pages than the data holds: a bomb is the second.
    for (pages, raw) in [(1u32, 4096u32), (3, 12288)] {
        let error = zstd(&[
            (20, &pages.to_le_bytes()),
            (12, &raw.to_le_bytes()),
            (40, &0x20001u64.to_le_bytes()),
        ])
        .unwrap_err();
        assert!(matches!(error, FrameError::Zstd(_)), "{error}");
    }
    let good = sample(Encoding::Zstd);
    let (head, data) = good.split_at(pages::HEADER + 2 * pages::RUN);
    let with = |data: &[u8]| {
        let mut bytes = [head, data].concat();
        bytes[8..12].copy_from_slice(&(data.len() as u32).to_le_bytes());
        decode(&bytes, 4096)
    };
    assert!(matches!(with(&[data, &[0]].concat()), Err(FrameError::Zstd(_))));
    assert!(matches!(with(&[data, data].concat()), Err(FrameError::Zstd(_))));
    assert!(matches!(with(&data[..data.len() - 1]), Err(FrameError::Zstd(_))));
    assert!(matches!(with(&[0; 100]), Err(FrameError::Zstd(_))));
    assert!(with(data).is_ok());
}

#[test]
fn a_claimed_section_is_not_allocated() {
    let mut decoder = SectionDecoder::default();
    decoder.push(Bytes::copy_from_slice(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]));
    assert!(matches!(decoder.next_section(), Err(FrameError::TooLong { limit, .. }) if limit == MAX_SECTION as u64));
}

#[test]
fn runs_are_checked_when_they_are_made() {
    assert!(matches!(Run::new(0, 1, 1, false), Err(FrameError::Misaligned { .. })));
    assert!(matches!(Run::new(0, 0, 0, false), Err(FrameError::EmptyRun { .. })));
    assert!(matches!(Run::new(0, 0, MAX_RUN_PAGES + 1, true), Err(FrameError::TooLong { .. })));
    assert!(matches!(
        Run::new(0, MAX_ADDRESS, 1, true),
        Err(FrameError::BeyondAddressSpace { .. })
    ));
    assert!(Run::new(0, MAX_ADDRESS - 4096, 1, true).is_ok());
    let run = Run::new(0, 0x1000, 3, false).unwrap();
    assert_eq!((run.end(), run.len(), run.data_len()), (0x4000, 12288, 12288));
}

#[test]
fn data_that_does_not_shrink_goes_raw() {
    let run = Run::new(0, 0, 16, false).unwrap();
    let random = Dice(3).bytes(16 * 4096);
    let bytes = encode(Encoding::Zstd, &[run], vec![random.clone().into()]);
    assert_eq!(bytes.len(), pages::HEADER + pages::RUN + random.len());
    assert_eq!(decode(&bytes, 1 << 20).unwrap()[0].concat(), random);
}

#[test]
fn raw_data_is_passed_through_without_a_copy() {
    let run = Run::new(0, 0, 1, false).unwrap();
    let page = Bytes::from(vec![1; 4096]);
    let sent = PageEncoder::default().encode(&[run], vec![page.clone()]).unwrap();
    assert_eq!(sent[1].as_ptr(), page.as_ptr());
    let mut decoder = PageDecoder::default();
    sent.into_iter().for_each(|chunk| decoder.push(chunk));
    assert_eq!(decoder.next_frame().unwrap().unwrap().data[0].as_ptr(), page.as_ptr());
}

fn hello() -> impl Strategy<Value = Hello> {
    let name = "[A-Za-z0-9._:-]{1,64}".prop_map(|text| PeerName::new(&text).unwrap());
    (any::<(u16, u16)>(), name, proptest::option::of(any::<[u8; 32]>())).prop_map(|((min, max), name, proof)| Hello {
        versions: VersionRange { min, max },
        name,
        proof,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_come_back(seed in any::<u64>(), piece in 1usize..20_000, zstd in any::<bool>()) {
        let mut dice = Dice(seed);
        let mut encoder = PageEncoder::default();
        encoder.set_encoding(if zstd { Encoding::Zstd } else { Encoding::Raw });
        let sent: Vec<_> = (0..4).map(|_| dice.frame()).collect();
        let stream: Vec<u8> = sent.iter().flat_map(|(runs, data)| encoder.encode(runs, data.clone()).unwrap().concat()).collect();
        let received = decode(&stream, piece).unwrap();
        prop_assert_eq!(received.len(), sent.len());
        for (frame, (runs, data)) in received.iter().zip(&sent) {
            prop_assert_eq!(&frame.runs, runs);
            prop_assert!(frame.concat() == data.concat());
            prop_assert_eq!(frame.data_len() as u64, runs.iter().map(Run::data_len).sum::<u64>());
        }
    }

    #[test]
    fn damage_never_yields_an_illegal_frame(seed in any::<u64>(), at in 0usize..48, byte in any::<u8>(), zstd in any::<bool>()) {
        let mut bytes = { let (runs, data) = Dice(seed).frame(); encode(if zstd { Encoding::Zstd } else { Encoding::Raw }, &runs, data) };
        let at = at % bytes.len();
        bytes[at] = byte;
        for frame in decode(&bytes, 4096).unwrap_or_default() {
            for run in &frame.runs {
                prop_assert_eq!(Run::new(run.space, run.start, run.pages, run.zero), Ok(*run));
            }
            prop_assert_eq!(frame.data_len(), pages::check_runs(&frame.runs).unwrap());
        }
    }

    #[test]
    fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..64) {
        let _ = decode(&noise, piece);
        let _ = decode(&[b"MPG1", &noise[..]].concat(), piece);
        let mut sections = SectionDecoder::default();
        sections.push(noise.clone().into());
        while let Ok(Some(_)) = sections.next_section() {}
        let _ = codec::decode::<Vec<(u64, String)>>(&noise);
    }

    #[test]
    fn overlaps_are_found_as_a_naive_search_finds_them(starts in proptest::collection::vec((0u32..2, 0u64..24, 1u32..5), 1..8)) {
        let runs: Vec<_> = starts.iter().map(|&(space, page, pages)| Run::new(space, page * 4096, pages, true).unwrap()).collect();
        let overlap = |a: &Run, b: &Run| a.space == b.space && a.start < b.end() && b.start < a.end();
        let naive = (0..runs.len()).any(|i| (0..i).any(|j| overlap(&runs[i], &runs[j])));
        prop_assert_eq!(pages::check_runs(&runs).is_err(), naive);
    }

    #[test]
    fn hellos_come_back(hello in hello(), at in 0usize..HELLO, byte in any::<u8>()) {
        let mut bytes = hello.encode();
        prop_assert_eq!(Hello::decode(&bytes).unwrap(), hello);
        bytes[at] = byte;
        let _ = Hello::decode(&bytes);
    }

    #[test]
    fn answers_come_back(hello in hello(), verdict in 0u8..6, version in any::<u16>()) {
        let mut bytes = Answer { verdict: Verdict::Welcome, versions: hello.versions, version, name: Some(hello.name) }.encode();
        bytes[8] = verdict;
        let answer = Answer::decode(&bytes).unwrap();
        prop_assert_eq!(answer.verdict as u8, verdict);
        prop_assert_eq!(answer.encode(), bytes);
        bytes[8] = verdict + 6;
        prop_assert!(Answer::decode(&bytes).is_err());
    }

    #[test]
    fn values_come_back(value in any::<Vec<(u64, String, Option<i32>)>>()) {
        let bytes = codec::encode(&value).unwrap();
        prop_assert_eq!(codec::decode::<Vec<(u64, String, Option<i32>)>>(&bytes).unwrap(), value);
        let longer = [&bytes[..], &[0]].concat();
        prop_assert!(codec::decode::<Vec<(u64, String, Option<i32>)>>(&longer).is_err());
    }
}

#[test]
fn a_refusal_tells_a_stranger_nothing() {
    let bytes = Answer::refusal(Verdict::NotAccepted).encode();
    assert!(bytes[..9] == *b"migrate\0\x01" && bytes[9..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_codec_bomb_is_refused() {
    // A vector that claims 2^60 elements.
    let claim = [&[253u8][..], &(1u64 << 60).to_le_bytes()].concat();
    assert!(codec::decode::<Vec<u64>>(&claim).is_err());
    assert!(codec::decode::<String>(&claim).is_err());
}

#[test]
fn versions_meet_where_they_can() {
    let range = |min, max| VersionRange { min, max };
    for (a, b, newest) in [
        (range(1, 1), range(1, 1), Some(1)),
        (range(1, 3), range(2, 5), Some(3)),
        (range(1, 2), range(3, 4), None),
        (range(4, 2), range(1, 9), None),
        (range(0, u16::MAX), range(7, 7), Some(7)),
    ] {
        assert_eq!((a.newest_common(b), b.newest_common(a)), (newest, newest));
    }
}
