//! Terminals, and which standard stream a descriptor follows.

use super::{
    context::{Context, Shape},
    sharing::Open,
};

/// The lowest of the numbers 0, 1, 2 among an open's descriptors that `fits`.
pub(super) fn lowest(context: &Context<'_>, open: &Open, fits: impl Fn(u8) -> bool) -> Option<u8> {
    let numbers = open.holders.iter().map(|&h| context.raws[h].fd);
    numbers.filter(|n| (0..=2).contains(n)).map(|n| n as u8).filter(|&n| fits(n)).min()
}

/// The streams of an open whose standard numbers are kept apart: 0, 1 and 2 follow themselves, others `rest`.
pub(super) fn split(context: &Context<'_>, open: &Open, rest: u8) -> Vec<u8> {
    let stream = |&h: &usize| match context.raws[h].fd {
        n @ 0..=2 => n as u8,
        _ => rest,
    };
    open.holders.iter().map(stream).collect()
}

/// Turns every terminal into standard streams, or refuses it.
pub(super) fn terminals(context: &mut Context<'_>, opens: &[Open], shapes: &mut [Shape]) {
    // /dev/tty, the controlling terminal by another name.
    let controlling = rustix::fs::makedev(5, 0);
    // Lowest standard number of each terminal.
    let mut streams: Vec<(u64, u8)> = Vec::new();
    for (open, shape) in opens.iter().zip(shapes.iter()) {
        if let Shape::Terminal { rdev, .. } = shape
            && let Some(n) = lowest(context, open, |_| true)
        {
            streams.push((*rdev, n));
        }
    }
    for (open, shape) in opens.iter().zip(shapes.iter_mut()) {
        let Shape::Terminal { rdev, was } = shape else { continue };
        let own = lowest(context, open, |_| true);
        let same = streams
            .iter()
            .filter(|(r, _)| r == rdev || *rdev == controlling)
            .map(|&(_, n)| n)
            .min();
        *shape = match own.or(same) {
            Some(rest) => Shape::Stdio {
                streams: split(context, open, rest),
                was: std::mem::take(was),
            },
            None => {
                let reason = format!("the terminal {was} is open, but not as standard input, output or error");
                context.refuse(
                    open,
                    reason,
                    "start the program with its standard streams on that terminal, or close it",
                )
            }
        };
    }
}
