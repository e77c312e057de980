/**
 * Cleans and checks the values of local rows before they are compared with other rows or sent to Square.
 *
 * Cleaning removes only what cannot change the meaning: white space around a value, characters that
 * cannot be seen, different kinds of dashes, the punctuation of a phone number. Everything else is
 * rejected with a reason. An invalid value must never become another value that looks valid: removing
 * the dot from the spreadsheet number `12065550100.0` would give the phone number of somebody else.
 *
 * libphonenumber-js was not used: it is stricter than Square and would reject numbers that Square takes.
 */
import { COUNTRIES, suggestCountry } from "./countries.ts";

/** The value as it is sent, where an empty text means blank, or why it cannot be sent. */
export type Normalized = { text: string; problem?: never } | { text?: never; problem: string };

// Cleans and checks one kind of text. The text is not blank.
type Normalizer = (text: string) => Normalized;

const NORMALIZERS = {
  line: normalizeLine,
  note: normalizeNote,
  email: normalizeEmail,
  phone: normalizePhone,
  birthday: normalizeBirthday,
  reference: normalizeReferenceId,
  vat: normalizeVat,
  postalCode: normalizePostalCode,
  country: normalizeCountry,
} satisfies Record<string, Normalizer>;

/** The kinds of text that are checked in different ways. */
export type TextKind = keyof typeof NORMALIZERS;

/** The problem of a text that was stored in another encoding than UTF-8. */
export const INVALID_UTF8 = "is not valid UTF-8 (was the CSV Latin-1?)";

// What cannot be seen: format characters such as zero-width spaces, byte order marks and text directions;
// variation selectors, fillers and the like; and the blank Braille pattern.
const INVISIBLE = /[\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]/gu;

// The invisible characters that names and notes lose, and only at the ends. Inside a text, and partly also
// at its end, an invisible character can carry meaning: zero-width joiners spell Persian and Indic names
// and hold emoji together, a variation selector makes a heart red, tag characters make the flag of
// Scotland. Those that are listed here have no effect at the end of a text.
const EDGE =
  "[\\s\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u2064\\u2066-\\u206f\\ufeff\\u2800\\u3164]";
const EDGES = new RegExp(`^${EDGE}+|${EDGE}+$`, "gu");

// The characters that are typed or auto-corrected in place of a hyphen: hyphens and dashes of every length
// and the minus sign. Between digits also the Japanese long vowel sign, which is on the same key. Not the
// wave dash, which means "to".
const DASHES =
  /[\u2010-\u2015\u2212\u2043\u02d7\ufe58\ufe63\uff0d]|(?<=[0-9])[\u30fc\uff70](?=[0-9])/gu;

// Numbers as spreadsheets and data frames write them after they took a text for a number: 98101.0, 98101,0,
// 1.2065550100E+10, 1e+05. An exponent without a sign or a fraction, as in 12e4567, can be part of an id.
const SPREADSHEET_NUMBER = /^[+-]?\d+(?:[.,]0+|[.,]\d+e[+-]?\d+|e[+-]\d+)$/i;

// A formula such as ="02134", and the apostrophe with which a spreadsheet marks a text.
const SPREADSHEET_MARK = /^(?:=|')/;

// A cell whose formula failed, or whose column was too narrow when it was copied.
const SPREADSHEET_ERROR =
  /^#(?:N\/A|REF!|VALUE!|NAME\?|NUM!|DIV\/0!|NULL!|ERROR!|SPILL!|CALC!)$|^#{3,}$/;

/**
 * Cleans and checks the value of a cell.
 * @param maxLength in UTF-16 code units. It is unknown whether Square counts those or code points. A text
 * never has more code points than code units, so a text that passes is short enough either way.
 */
export function normalizeCell(
  value: unknown,
  kind: TextKind,
  maxLength = Number.POSITIVE_INFINITY,
): Normalized {
  if (value instanceof Uint8Array && value.length > 0)
    return { problem: "holds bytes (a BLOB): store it as text" };
  // SQLite keeps 12065550100.0 as the text "12065550100.0" in a TEXT column. In a column without a type it
  // stays a number, which sql.js reads like the integer.
  if (typeof value === "number" && !Number.isSafeInteger(value))
    return { problem: "is a number with a fraction or with too many digits: store it as text" };
  const raw = value === null || value === undefined ? "" : String(value);
  if (isBlank(raw)) return { text: "" };

  if (/[\p{Cs}\ufffd]/u.test(raw))
    return { problem: "contains U+FFFD, which replaces damaged text (was the CSV Latin-1?)" };
  if (SPREADSHEET_ERROR.test(raw.trim())) return { problem: "is an error value of a spreadsheet" };
  const { text, problem } = NORMALIZERS[kind](raw);
  if (problem !== undefined) return { problem };
  // The `square` package marks big integers with this suffix and would send the text as a number.
  if (/(?:^|")-?\d+#bigint#$/.test(text))
    return { problem: "ends with #bigint#, which cannot be sent" };
  if (text.length > maxLength)
    return { problem: `is longer than ${maxLength} characters (most emoji count as two or more)` };
  return { text };
}

/** The text with each kind of dash replaced by a hyphen. */
export function unifyDashes(text: string): string {
  return text.replace(DASHES, "-");
}

/** True for a text in which nothing can be seen. */
export function isBlank(text: string): boolean {
  return text.replace(INVISIBLE, "").trim() === "";
}

const UTF8 = new TextDecoder("utf-8", { fatal: true });

/**
 * True if the bytes of a text, as `CAST(column AS BLOB)` returns them, are valid UTF-8. sql.js decodes
 * invalid bytes without an error to U+FFFD, and saving the decoded text would destroy the original.
 */
export function isValidUtf8(bytes: Uint8Array): boolean {
  try {
    UTF8.decode(bytes);
    return true;
  } catch {
    return false;
  }
}

// A name or a line of an address.
function normalizeLine(raw: string): Normalized {
  return rejectControls(raw.replace(EDGES, ""), /\p{Cc}/u);
}

// A note can have several lines.
function normalizeNote(raw: string): Normalized {
  return rejectControls(raw.replace(EDGES, ""), /(?![\t\n\r])\p{Cc}/u);
}

/** The case and the dashes of a reference id stay, because it must equal the id in another system. */
export function normalizeReferenceId(raw: string): Normalized {
  const text = removeInvisible(raw);
  return findSpreadsheetProblem(text) ?? rejectControls(text, /\p{Cc}/u);
}

function normalizePostalCode(raw: string): Normalized {
  const text = unifyDashes(removeInvisible(raw));
  const problem = findSpreadsheetProblem(text);
  if (problem) return problem;
  // Thousands separators: 98,101.
  if (/^\d{1,3}(?:[.,]\d{3})+$/.test(text))
    return { problem: "is invalid: expected a postal code, not a number with separators" };
  return rejectControls(text, /\p{Cc}/u);
}

// Square documents that a VAT number has letters and digits only.
function normalizeVat(raw: string): Normalized {
  const text = removeInvisible(raw);
  const problem = findSpreadsheetProblem(text);
  if (problem) return problem;
  if (/^[A-Za-z0-9]+$/.test(text)) return { text };
  return invalid("letters and digits only, for example IE3426675K", text, /[^A-Za-z0-9]/u);
}

// One address, without a name (Ada <ada@example.com>) and without quotes.
function normalizeEmail(raw: string): Normalized {
  const text = unifyDashes(removeInvisible(raw));
  const problem = findSpreadsheetProblem(text);
  if (problem) return problem;
  const isEmail = /^[^\s\p{Cc}@<>()[\]\\,;:"]+@[\p{L}\p{M}\p{N}_-]+(?:\.[\p{L}\p{M}\p{N}_-]+)+$/u;
  if (isEmail.test(text)) return { text };
  return invalid("one address, for example ada@example.com", text, /[^!-~\p{L}\p{M}\p{N}]/u);
}

const PHONE_EXAMPLE = "for example +12065550100";

// The spaces, dots, dashes and brackets between the digits are removed. Square takes 9 to 16 digits, with
// or without + and the country code.
function normalizePhone(raw: string): Normalized {
  const text = unifyDashes(removeInvisible(raw));
  const problem = hasFraction(text) ? DECIMAL_NUMBER : findSpreadsheetProblem(text);
  if (problem) return problem;

  const national = removeTrunkZero(text);
  // What is left of "(0)" was not preceded by a country code alone, so its meaning is unclear.
  if (/.\(0\)/.test(national))
    return {
      problem: `is invalid: the (0) is ambiguous, write the digits to dial, ${PHONE_EXAMPLE}`,
    };
  // A minus sign in front would make a negative number look like a phone number. Line breaks separate
  // two numbers, and are not in \p{Zs}.
  const isNumber = /^[(+]*[0-9][0-9\p{Zs}().-]*$/u.test(national);
  const phone = national.replace(/[^+0-9]/g, "");
  if (/^\+?00/.test(phone) || /^011[0-9]{10}/.test(phone) || phone.startsWith("+0"))
    return { problem: `is invalid: write + and the country code first, ${PHONE_EXAMPLE}` };
  if (isNumber && /^\+?[0-9]{9,16}$/.test(phone)) return { text: phone };
  // 206-555-0100 x5: the digits of the extension must not become part of the number.
  const hasExtension = /[0-9]{4}.*[\p{L}#,;]/u.test(text);
  const extension = hasExtension ? " without an extension" : "";
  return invalid(`9 to 16 digits${extension}, ${PHONE_EXAMPLE}`, text, /[^0-9 +().-]/u);
}

// A formatted number can end with a fraction too: (206) 555-0100.0. A single dot after nine digits or more
// does not separate groups. The French 01.23.45.67.00 has no fraction.
function hasFraction(phone: string): boolean {
  if (/[.,]0$|[0-9]{3}\.00$/.test(phone)) return true;
  const [whole = "", ...rest] = phone.split(".");
  return rest.length === 1 && rest[0] !== "" && whole.replace(/[^0-9]/g, "").length >= 9;
}

/**
 * Removes the (0) after a country code: in +44 (0)20 the 0 is dialled only inside the country, without the
 * 44. In Italy (39) and San Marino (378) the 0 is part of the number and is dialled from abroad too, so a
 * (0) stays there.
 */
export function removeTrunkZero(text: string): string {
  const [start, code] = /^\(?(?:\+|00)?([1-9][0-9]{0,2})\)?[\s.-]*(?=\(0\))/.exec(text) ?? [];
  if (start === undefined || code === "39" || code === "378") return text;
  return start + text.slice(start.length).replace("(0)", "");
}

// YYYY-MM-DD, or MM-DD if the year is unknown. Square returns the latter with the year 0000. Other orders
// of day and month, and the day numbers of spreadsheets such as 32988, are rejected, not guessed.
function normalizeBirthday(raw: string): Normalized {
  const text = unifyDashes(removeInvisible(raw));
  const [, year = "0000", day = ""] = /^(?:([0-9]{4})-)?([0-9]{2}-[0-9]{2})$/.exec(text) ?? [];
  const hasYear = year !== "0000";
  // The year 2000 had a 29 February. Date turns a day that does not exist into a day of the next month.
  const date = new Date(`${hasYear ? year : "2000"}-${day}T00:00Z`);
  if (date.toJSON()?.slice(5, 10) === day) return { text: hasYear ? `${year}-${day}` : day };
  const expected = "YYYY-MM-DD or MM-DD, for example 1990-04-25";
  if (/^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ]/.test(text))
    return { problem: `is invalid: expected a date without a time: ${expected}` };
  return invalid(expected, text, /[^!-~ ]/u);
}

// A country of Square's list, in upper case. One unknown code would make the `square` package reject a
// whole call of 100 rows.
function normalizeCountry(raw: string): Normalized {
  const text = removeInvisible(raw);
  const code = text.toUpperCase();
  if (COUNTRIES.has(code)) return { text: code };
  const suggested = suggestCountry(text);
  const hint = suggested === undefined ? "for example US" : `perhaps ${suggested}`;
  return invalid(`a two-letter country code, ${hint}`, text, /[^!-~\p{L}\p{M} ]/u);
}

function removeInvisible(raw: string): string {
  return raw.replace(INVISIBLE, "").trim();
}

const DECIMAL_NUMBER: Normalized = {
  problem: "is invalid: it looks like a decimal number of a spreadsheet, store it as text",
};

function findSpreadsheetProblem(text: string): Normalized | undefined {
  if (SPREADSHEET_NUMBER.test(text)) return DECIMAL_NUMBER;
  if (SPREADSHEET_MARK.test(text))
    return { problem: "is invalid: it begins with the = or ' of a spreadsheet, remove it" };
  return undefined;
}

function rejectControls(text: string, control: RegExp): Normalized {
  const found = control.exec(text)?.[0];
  if (found === undefined) return { text };
  return { problem: `contains ${describeCharacter(found)}` };
}

// Only a character that the person may not see, or may take for another one, is named. The value itself
// is not repeated, because it can be personal data.
function invalid(expected: string, text: string, unexpected: RegExp): Normalized {
  const found = unexpected.exec(text)?.[0];
  const isPlain = found === undefined || /^[ -~]$/.test(found);
  const detail = isPlain ? "" : ` (it contains ${describeCharacter(found)})`;
  return { problem: `is invalid: expected ${expected}${detail}` };
}

function describeCharacter(character: string): string {
  const hex = (character.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, "0");
  const name = CHARACTER_NAMES[hex];
  return name === undefined ? `U+${hex}` : `U+${hex} (${name})`;
}

const CHARACTER_NAMES: Readonly<Record<string, string>> = {
  "0009": "a tab",
  "000A": "a line break",
  "000D": "a line break",
  "00A0": "a no-break space",
};
