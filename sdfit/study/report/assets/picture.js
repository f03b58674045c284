// The size of a picture from its header: PNG, JPEG, WebP, GIF, BMP and AVIF, turned as its EXIF note says.
//
// A file is read by small slices; no pixel is decoded, and nothing leaves the page.
"use strict";

const pictures = (() => {
  const TURNED = [5, 6, 7, 8];
  const ascii = (view, at, length) => { let text = ""; for (let i = 0; i < length; i++) text += String.fromCharCode(view.getUint8(at + i)); return text; };

  /** Height and width [pixels] as the picture is shown; null where the format is unknown or the header damaged. */
  async function size(blob) {
    const slice = async (at, length) => new DataView(await blob.slice(at, at + length).arrayBuffer());
    try {
      const head = await slice(0, 32);
      const found = head.getUint32(0) === 0x89504e47 ? await png(slice)
        : head.getUint16(0) === 0xffd8 ? await jpeg(slice)
        : ascii(head, 0, 4) === "RIFF" && ascii(head, 8, 4) === "WEBP" ? await webp(slice, blob.size)
        : ascii(head, 0, 3) === "GIF" ? { width: head.getUint16(6, true), height: head.getUint16(8, true) }
        : ascii(head, 0, 2) === "BM" ? { width: Math.abs(head.getInt32(18, true)), height: Math.abs(head.getInt32(22, true)) }
        : ascii(head, 4, 4) === "ftyp" ? await avif(slice) : null;
      if (!found || !found.width || !found.height) return null;
      return TURNED.includes(found.orientation) ? { height: found.width, width: found.height } : { height: found.height, width: found.width };
    } catch (error) {
      if (error instanceof RangeError) return null;   // the file ends inside its header
      throw error;
    }
  }

  /** The orientation that an EXIF block notes; 1 if it notes none. */
  function orientation(view, at) {
    const little = ascii(view, at, 2) === "II", first = at + view.getUint32(at + 4, little);
    for (let i = 0, count = view.getUint16(first, little); i < count; i++) {
      const entry = first + 2 + 12 * i;
      if (view.getUint16(entry, little) === 0x0112) return view.getUint16(entry + 8, little);
    }
    return 1;
  }

  async function png(slice) {
    const found = {};
    for (let at = 8; ;) {
      const chunk = await slice(at, 16), length = chunk.getUint32(0), kind = ascii(chunk, 4, 4);
      if (kind === "IHDR") { found.width = chunk.getUint32(8); found.height = chunk.getUint32(12); }
      if (kind === "eXIf") found.orientation = orientation(await slice(at + 8, length), 0);
      if (kind === "IDAT" || kind === "IEND") return found;
      at += 12 + length;
    }
  }

  async function jpeg(slice) {
    const found = {};
    for (let at = 2; ;) {
      const segment = await slice(at, 20), marker = segment.getUint8(1);
      if (segment.getUint8(0) !== 0xff) return null;
      if (marker === 0xff) { at += 1; continue; }
      const length = segment.getUint16(2);
      if (marker === 0xe1 && ascii(segment, 4, 4) === "Exif") found.orientation = orientation(await slice(at + 10, length - 8), 0);
      if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
        return { ...found, height: segment.getUint16(5), width: segment.getUint16(7) };
      }
      at += 2 + length;
    }
  }

  async function webp(slice, total) {
    const found = {};
    for (let at = 12; at + 8 <= total;) {
      const chunk = await slice(at, 18), kind = ascii(chunk, 0, 4), length = chunk.getUint32(4, true);
      if (kind === "VP8X") {
        found.width = 1 + (chunk.getUint16(12, true) | (chunk.getUint8(14) << 16));
        found.height = 1 + (chunk.getUint16(15, true) | (chunk.getUint8(17) << 16));
        if (!(chunk.getUint8(8) & 8)) return found;   // it says that no EXIF follows
      } else if (kind === "VP8 " && !found.width) {
        const frame = await slice(at + 14, 4);
        return { width: frame.getUint16(0, true) & 0x3fff, height: frame.getUint16(2, true) & 0x3fff };
      } else if (kind === "VP8L" && !found.width) {
        const bits = chunk.getUint32(9, true);
        return { width: 1 + (bits & 0x3fff), height: 1 + ((bits >>> 14) & 0x3fff) };
      } else if (kind === "EXIF") {
        const block = await slice(at + 8, length);
        return { ...found, orientation: orientation(block, ascii(block, 0, 4) === "Exif" ? 6 : 0) };
      }
      at += 8 + length + (length & 1);
    }
    return found;
  }

  /** AVIF: the first image size in its boxes, and whether it is turned by a quarter. */
  async function avif(slice) {
    const head = await slice(0, 4096), end = head.byteLength - 12;
    let found = null, turned = false;
    for (let at = 0; at < end; at++) {
      if (head.getUint8(at) !== 0x69) continue;   // "i"
      const kind = ascii(head, at, 4);
      if (kind === "ispe" && !found) found = { width: head.getUint32(at + 8), height: head.getUint32(at + 12) };
      if (kind === "irot") turned = Boolean(head.getUint8(at + 4) & 1);
    }
    return found && { ...found, orientation: turned ? 6 : 1 };
  }

  return { size };
})();
