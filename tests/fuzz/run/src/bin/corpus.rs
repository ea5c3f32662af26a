//! `corpus unpack FILE DIR` and `corpus pack DIR FILE`: the inputs of a target, one a file for libFuzzer, all in one for the repository.

use std::{env, fs, io, path::Path};

/// Bytes of a packed corpus at most, about.
const ENOUGH: usize = 300 << 10;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let usage = || io::Error::new(io::ErrorKind::InvalidInput, "corpus unpack FILE DIR | corpus pack DIR FILE");
    let [what, from, to] = arguments.as_slice() else {
        return Err(usage());
    };
    match what.as_str() {
        "unpack" => {
            fs::create_dir_all(to)?;
            let corpus = fs::read(from)?;
            for (k, input) in migrate_fuzz::inputs(&corpus).into_iter().enumerate() {
                fs::write(Path::new(to).join(format!("kept-{k:05}")), input)?;
            }
            Ok(())
        }
        "pack" => {
            let mut files = Vec::new();
            for entry in fs::read_dir(from)? {
                files.push(fs::read(entry?.path())?);
            }
            files.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
            let mut corpus = Vec::new();
            let mut keep = |f: &Vec<u8>, room: usize| {
                let fits = corpus.len() + f.len() <= room;
                if fits {
                    corpus.extend((f.len() as u32).to_le_bytes());
                    corpus.extend(f);
                }
                fits
            };
            // The longest are what real programs say, the shortest what somebody thought of; of those between there are many alike.
            let long = files.iter().rev().take_while(|f| keep(f, ENOUGH / 3)).count();
            files[..files.len() - long].iter().take_while(|f| keep(f, ENOUGH)).count();
            fs::write(to, corpus)
        }
        _ => Err(usage()),
    }
}
