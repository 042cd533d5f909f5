//! Numbers cut into planes of bytes, each compressed where that gains something. Lossless.
//!
//! Exponents of neighbours are alike, mantissas are noise: apart, the first compress well and the
//! second are not touched. The loops have no branches, so that they become vector code.

/// Fast, and on noise next to none of the others gains more.
const LEVEL: i32 = 1;
/// A plane's header: how it is kept, and its length.
const HEADER: usize = 9;
const STORED: u8 = 0;
const ZSTD: u8 = 1;

/// The planes of `raw`, numbers of `size` bytes; `None` where they gain less than 2 %, and for
/// bytes, whose planes they are.
pub(super) fn encode(raw: &[u8], size: usize) -> Option<Vec<u8>> {
    let planes = match size {
        2 => split16(raw),
        4 => split32(raw),
        _ => return None,
    };
    let mut compressor = zstd::bulk::Compressor::new(LEVEL).ok()?;
    let mut header = Vec::with_capacity(HEADER * size);
    let mut body = Vec::with_capacity(raw.len());
    for plane in planes {
        // a failure of the compressor leaves the plane as it is
        let packed = compressor.compress(&plane).ok().filter(|p| gains(p.len(), plane.len()));
        header.push(if packed.is_some() { ZSTD } else { STORED });
        let kept = packed.unwrap_or(plane);
        header.extend((kept.len() as u64).to_le_bytes());
        body.extend(kept);
    }
    let total = header.len() + body.len();
    gains(total, raw.len()).then(|| [header, body].concat())
}

/// Memory to work in.
#[derive(Default)]
pub(super) struct Scratch {
    unpacked: Vec<u8>,
    decompressor: zstd::bulk::Decompressor<'static>,
}

/// Writes the numbers again to `out`, which has their length; `None` where the bytes are no
/// planes of so many.
pub(super) fn decode(
    stored: &[u8],
    size: usize,
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Option<()> {
    let (header, mut body) = stored.split_at_checked(HEADER * size)?;
    let Scratch { unpacked, decompressor } = scratch;
    let count = out.len() / size;
    unpacked.resize(out.len(), 0);
    let mut planes: Vec<&[u8]> = Vec::with_capacity(size);
    for (entry, place) in header.chunks_exact(HEADER).zip(unpacked.chunks_mut(count.max(1))) {
        let kept = u64::from_le_bytes(entry[1..].try_into().expect("a header has nine bytes"));
        let (plane, rest) = body.split_at_checked(usize::try_from(kept).ok()?)?;
        body = rest;
        planes.push(match entry[0] {
            STORED if plane.len() == count => plane,
            ZSTD => {
                let written = decompressor.decompress_to_buffer(plane, &mut *place).ok()?;
                (written == count).then_some(&*place)?
            }
            _ => return None,
        });
    }
    if !body.is_empty() {
        return None;
    }
    match &planes[..] {
        [a, b] => join16(a, b, out),
        [a, b, c, d] => join32([a, b, c, d], out),
        _ => return None,
    }
    Some(())
}

/// Whether it is at least 2 % smaller.
fn gains(packed: usize, plain: usize) -> bool {
    packed as u64 * 100 <= plain as u64 * 98
}

fn split16(raw: &[u8]) -> Vec<Vec<u8>> {
    let count = raw.len() / 2;
    let (mut a, mut b) = (vec![0; count], vec![0; count]);
    for ((x, a), b) in raw.chunks_exact(2).zip(&mut a).zip(&mut b) {
        let x = u16::from_le_bytes([x[0], x[1]]);
        *a = (x >> 7) as u8;
        *b = ((x >> 8) & 0x80 | x & 0x7f) as u8;
    }
    vec![a, b]
}

fn join16(a: &[u8], b: &[u8], out: &mut [u8]) {
    for ((out, a), b) in out.chunks_exact_mut(2).zip(a).zip(b) {
        let (a, b) = (u16::from(*a), u16::from(*b));
        let x = (b & 0x80) << 8 | a << 7 | b & 0x7f;
        out.copy_from_slice(&x.to_le_bytes());
    }
}

fn split32(raw: &[u8]) -> Vec<Vec<u8>> {
    let numbers = || raw.chunks_exact(4).map(|x| u32::from_le_bytes([x[0], x[1], x[2], x[3]]));
    vec![
        numbers().map(|x| (x >> 23) as u8).collect(),
        numbers().map(|x| ((x >> 24) & 0x80 | (x >> 16) & 0x7f) as u8).collect(),
        numbers().map(|x| (x >> 8) as u8).collect(),
        numbers().map(|x| x as u8).collect(),
    ]
}

fn join32([a, b, c, d]: [&[u8]; 4], out: &mut [u8]) {
    let low = c.iter().zip(d).map(|(&c, &d)| u32::from(c) << 8 | u32::from(d));
    for (((out, a), b), low) in out.chunks_exact_mut(4).zip(a).zip(b).zip(low) {
        let (a, b) = (u32::from(*a), u32::from(*b));
        let x = (b & 0x80) << 24 | a << 23 | (b & 0x7f) << 16 | low;
        out.copy_from_slice(&x.to_le_bytes());
    }
}
