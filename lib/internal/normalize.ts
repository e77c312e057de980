/**
 * Cleans and checks the values of local rows before they are compared with other rows or sent to
 * Square.
 *
 * Cleaning removes only characters that cannot change the meaning: space around a value, invisible
 * characters, the differences between dashes, and the punctuation of a phone number. Every other
 * unexpected character makes the value invalid. An invalid value must never become another value
 * that looks valid. For example, without its dot the spreadsheet number `12065550100.0` would be
 * another phone number.
 *
 * Phone numbers are checked here and not with libphonenumber-js, because that library is stricter
 * than Square. It would reject numbers that Square accepts.
 */
import { COUNTRIES, suggestCountry } from "./countries.ts";
import { isRealDate } from "./time.ts";

/**
 * A cleaned value: either the text to send, which is empty for a blank cell, or the problem that
 * makes the value invalid. A message shows the problem after the name of the column, for example
 * `phone_number is invalid: …`.
 */
export type Normalized = { text: string; problem?: never } | { text?: never; problem: string };

// Cleans and checks a text that is not blank.
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

/** The kinds of text. Each kind has its own rules. */
export type TextKind = keyof typeof NORMALIZERS;

// The invisible characters: format characters such as zero-width spaces, byte order marks and text
// directions; variation selectors and fillers; and the blank Braille pattern.
const INVISIBLE = /[\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]/gu;

// Names and notes lose only these characters, and only at their ends, where they have no effect.
// The other invisible characters can carry meaning: zero-width joiners spell Persian and Indic
// names and hold emoji together, a variation selector makes a heart red, and tag characters make
// the flag of Scotland. In this order: white space, soft hyphen, Arabic letter mark, Mongolian
// separator, zero-width space, text directions, word joiner and the like, byte order mark, fillers.
const EDGE_CHARACTER =
  "[\\s\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u2064\\u2066-\\u206f\\ufeff\\u2800\\u3164]";
const EDGES = new RegExp(`^${EDGE_CHARACTER}+|${EDGE_CHARACTER}+$`, "gu");

// The characters that people type, or programs insert, in place of a hyphen: dashes of every length
// and the minus sign. Between digits, the Japanese long vowel sign is a hyphen too, because both
// are on one key of a Japanese keyboard. The wave dash is not in the list, because it means "to".
const DASHES =
  /[\u2010-\u2015\u2212\u2043\u02d7\ufe58\ufe63\uff0d]|(?<=[0-9])[\u30fc\uff70](?=[0-9])/gu;

// Control characters are invalid. A note can have several lines and tabs.
const CONTROL = /\p{Cc}/u;
const CONTROL_IN_NOTE = /(?![\t\n\r])\p{Cc}/u;

// A message names a character that a person may not see or may confuse with another one. STRANGE is
// everything except printable ASCII. STRANGE_IN_TEXT also leaves out letters and digits of any
// language, which are normal in an email address or the name of a country.
const STRANGE = /[^ -~]/u;
const STRANGE_IN_TEXT = /[^ -~\p{L}\p{M}\p{N}]/u;

// Spreadsheets and data frames write a text in these forms if they mistake it for a number:
// 98101.0, 98101,0, 1.2065550100E+10, 1e+05. An exponent without a sign or a fraction, as in
// 12e4567, can be part of an id, so it is not in the pattern.
const SPREADSHEET_NUMBER = /^[+-]?\d+(?:[.,]0+|[.,]\d+e[+-]?\d+|e[+-]\d+)$/i;
const DECIMAL_NUMBER_PROBLEM =
  "is invalid: it looks like a decimal number of a spreadsheet, store it as text";

// A formula such as ="02134", or the apostrophe with which a spreadsheet marks a text.
const SPREADSHEET_MARK = /^(?:=|')/;
const SPREADSHEET_MARK_PROBLEM =
  "is invalid: it begins with the = or ' of a spreadsheet, remove it";

// A cell whose formula failed, or whose column was too narrow when it was copied.
const SPREADSHEET_ERROR =
  /^#(?:N\/A|REF!|VALUE!|NAME\?|NUM!|DIV\/0!|NULL!|ERROR!|SPILL!|CALC!)$|^#{3,}$/;

const PHONE_EXAMPLE = "for example +12065550100";

const CHARACTER_NAMES: Readonly<Record<string, string>> = {
  "0009": "a tab",
  "000A": "a line break",
  "000D": "a line break",
  "00A0": "a no-break space",
};

/**
 * Cleans and checks the value of a cell.
 * @param maxLength the maximum length in UTF-16 code units. Square does not document whether it
 *   counts code units or code points. A text never has more code points than code units, so a text
 *   that passes here is short enough either way.
 */
export function normalizeCell(
  value: unknown,
  kind: TextKind,
  maxLength = Number.POSITIVE_INFINITY,
): Normalized {
  if (value instanceof Uint8Array && value.length > 0)
    return { problem: "holds bytes (a BLOB): store it as text" };
  // A number with a fraction comes from a column with a numeric type. From a TEXT column, the same
  // cell is the text 12065550100.0, which the checks below find.
  if (typeof value === "number" && !Number.isSafeInteger(value))
    return { problem: "is a number with a fraction or with too many digits: store it as text" };
  const raw = value === null || value === undefined ? "" : String(value);
  if (isBlank(raw)) return { text: "" };

  // \p{Cs} is half of a surrogate pair. It would be stored as U+FFFD.
  if (/[\p{Cs}\ufffd]/u.test(raw))
    return { problem: "contains U+FFFD, which replaces damaged text (was the CSV Latin-1?)" };
  if (SPREADSHEET_ERROR.test(raw.trim())) return { problem: "is an error value of a spreadsheet" };

  const { text, problem } = NORMALIZERS[kind](raw);
  if (problem !== undefined) return { problem };
  // The `square` package writes the bigint 12 as "12#bigint#", and then removes the quotes and the
  // suffix from the finished JSON. A text in this form would become a number or break the JSON.
  if (/(?:^|")-?\d+#bigint#$/.test(text))
    return { problem: "ends with #bigint#, which cannot be sent" };
  if (text.length > maxLength)
    return { problem: `is longer than ${maxLength} characters (most emoji count as two or more)` };
  return { text };
}

/** Replaces each kind of dash by a hyphen. */
export function unifyDashes(text: string): string {
  return text.replace(DASHES, "-");
}

/** True for a text that consists only of space and invisible characters. */
export function isBlank(text: string): boolean {
  return removeInvisibleAndTrim(text) === "";
}

// A name, or a line of an address.
function normalizeLine(raw: string): Normalized {
  return checkControls(raw.replace(EDGES, ""), CONTROL);
}

function normalizeNote(raw: string): Normalized {
  return checkControls(raw.replace(EDGES, ""), CONTROL_IN_NOTE);
}

// The case and the dashes of a reference id stay, because it must equal the id in another system.
function normalizeReferenceId(raw: string): Normalized {
  const text = removeInvisibleAndTrim(raw);
  const problem = findSpreadsheetProblem(text);
  if (problem !== undefined) return { problem };
  return checkControls(text, CONTROL);
}

function normalizePostalCode(raw: string): Normalized {
  const text = unifyDashes(removeInvisibleAndTrim(raw));
  const problem = findSpreadsheetProblem(text);
  if (problem !== undefined) return { problem };
  // A number with thousands separators, such as 98,101.
  if (/^\d{1,3}(?:[.,]\d{3})+$/.test(text))
    return { problem: "is invalid: expected a postal code, not a number with separators" };
  return checkControls(text, CONTROL);
}

// Square documents that a VAT number consists of letters and digits.
function normalizeVat(raw: string): Normalized {
  const text = removeInvisibleAndTrim(raw);
  const problem = findSpreadsheetProblem(text);
  if (problem !== undefined) return { problem };
  if (/^[A-Za-z0-9]+$/.test(text)) return { text };
  return reject("letters and digits only, for example IE3426675K", text, STRANGE);
}

// One address, without a name (Ada <ada@example.com>) and without quotes.
function normalizeEmail(raw: string): Normalized {
  const text = unifyDashes(removeInvisibleAndTrim(raw));
  const problem = findSpreadsheetProblem(text);
  if (problem !== undefined) return { problem };
  const address = /^[^\s\p{Cc}@<>()[\]\\,;:"]+@[\p{L}\p{M}\p{N}_-]+(?:\.[\p{L}\p{M}\p{N}_-]+)+$/u;
  if (address.test(text)) return { text };
  return reject("one address, for example ada@example.com", text, STRANGE_IN_TEXT);
}

// Removes the spaces, dots, dashes and brackets between the digits. Square accepts 9 to 16 digits,
// with or without + and the country code.
function normalizePhone(raw: string): Normalized {
  const text = unifyDashes(removeInvisibleAndTrim(raw));
  const problem = hasFraction(text) ? DECIMAL_NUMBER_PROBLEM : findSpreadsheetProblem(text);
  if (problem !== undefined) return { problem };

  // removeTrunkZero removes a (0) after most country codes. A (0) at the beginning is the prefix of
  // a national number. With any other (0), inside the number or after the code of Italy or San
  // Marino, it is unclear whether the 0 has to be dialled.
  const dialled = removeTrunkZero(text);
  const hasAmbiguousZero = /.\(0\)/.test(dialled); // The dot: not at the beginning.
  if (hasAmbiguousZero)
    return {
      problem: `is invalid: the (0) is ambiguous, write the digits to dial, ${PHONE_EXAMPLE}`,
    };

  // The prefix in front of a country code is + everywhere, but 00 or 011 only in some countries.
  // With less than ten digits after it, 011 can be the area code of Turin.
  const phone = dialled.replace(/[^+0-9]/g, "");
  const hasOtherPrefix = /^\+?00/.test(phone) || /^011[0-9]{10}/.test(phone);
  // No country code begins with 0.
  const hasInvalidCode = phone.startsWith("+0");
  if (hasOtherPrefix || hasInvalidCode)
    return { problem: `is invalid: write + and the country code first, ${PHONE_EXAMPLE}` };

  // A number does not begin with a hyphen, because a negative number is not a phone number. The
  // pattern has \p{Zs} and not \s, so that two numbers with a line break between them are invalid.
  const hasPhoneCharacters = /^[(+]*[0-9][0-9\p{Zs}().-]*$/u.test(dialled);
  if (hasPhoneCharacters && /^\+?[0-9]{9,16}$/.test(phone)) return { text: phone };

  // If the text seems to have an extension, as in 206-555-0100 x5, the message says to leave it
  // out.
  const hasExtension = /[0-9]{4}.*[\p{L}#,;]/u.test(text);
  const digits = hasExtension ? "9 to 16 digits without an extension" : "9 to 16 digits";
  return reject(`${digits}, ${PHONE_EXAMPLE}`, text, STRANGE);
}

// Finds the fraction of a spreadsheet number also in a formatted phone number.
function hasFraction(phone: string): boolean {
  // For example (206) 555-0100.0 and 2065550100.00. In the French number 01.23.45.67.00 the last
  // two digits follow a group of two digits, so they are not a fraction.
  if (/[.,]0$|[0-9]{3}\.00$/.test(phone)) return true;
  // A single dot after nine digits or more is a decimal point, because no country writes such a
  // long first group.
  const [whole = "", fraction = "", third] = phone.split(".");
  const hasOneDot = fraction !== "" && third === undefined;
  return hasOneDot && whole.replace(/[^0-9]/g, "").length >= 9;
}

/**
 * Removes a (0) that follows a country code. In +44 (0)20, the 0 is dialled only within the
 * country, without the 44. In Italy (39) and San Marino (378), the 0 of a landline is dialled from
 * abroad too, and mobile numbers have none. So the (0) stays there, and normalizePhone rejects the
 * number.
 */
export function removeTrunkZero(text: string): string {
  const match = /^(\(?(?:\+|00)?([1-9][0-9]{0,2})\)?[\s.-]*)\(0\)(.*)$/s.exec(text);
  if (match === null) return text;
  const [, start = "", countryCode = "", rest = ""] = match;
  return countryCode === "39" || countryCode === "378" ? text : start + rest;
}

// A birthday is YYYY-MM-DD, or MM-DD if the year is unknown. Square returns the latter with the
// year 0000. Other orders of day and month, and the day numbers of spreadsheets such as 32988, are
// ambiguous, so they are rejected.
function normalizeBirthday(raw: string): Normalized {
  const text = unifyDashes(removeInvisibleAndTrim(raw));
  const match = /^(?:([0-9]{4})-)?([0-9]{2}-[0-9]{2})$/.exec(text);
  if (match !== null) {
    const [, year = "0000", monthAndDay = ""] = match;
    const hasYear = year !== "0000";
    // Without a year, any day of a leap year is possible, and 2000 was one.
    if (isRealDate(`${hasYear ? year : "2000"}-${monthAndDay}`))
      return { text: hasYear ? `${year}-${monthAndDay}` : monthAndDay };
  }
  const expected = "YYYY-MM-DD or MM-DD, for example 1990-04-25";
  if (/^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ]/.test(text))
    return { problem: `is invalid: expected a date without a time: ${expected}` };
  return reject(expected, text, STRANGE);
}

// A country that Square's list has, in upper case. A single unknown code would make the `square`
// package reject a whole call of 100 rows.
function normalizeCountry(raw: string): Normalized {
  const text = removeInvisibleAndTrim(raw);
  const code = text.toUpperCase();
  if (COUNTRIES.has(code)) return { text: code };
  const suggested = suggestCountry(text);
  const hint = suggested === undefined ? "for example US" : `perhaps ${suggested}`;
  return reject(`a two-letter country code, ${hint}`, text, STRANGE_IN_TEXT);
}

function removeInvisibleAndTrim(raw: string): string {
  return raw.replace(INVISIBLE, "").trim();
}

function findSpreadsheetProblem(text: string): string | undefined {
  if (SPREADSHEET_NUMBER.test(text)) return DECIMAL_NUMBER_PROBLEM;
  if (SPREADSHEET_MARK.test(text)) return SPREADSHEET_MARK_PROBLEM;
  return undefined;
}

function checkControls(text: string, control: RegExp): Normalized {
  const found = control.exec(text)?.[0];
  if (found === undefined) return { text };
  return { problem: `contains ${describeCharacter(found)}` };
}

// The message does not repeat the value, because it can be personal data. It names only a strange
// character.
function reject(expected: string, text: string, strange: RegExp): Normalized {
  const found = strange.exec(text)?.[0];
  const detail = found === undefined ? "" : ` (it contains ${describeCharacter(found)})`;
  return { problem: `is invalid: expected ${expected}${detail}` };
}

function describeCharacter(character: string): string {
  const hex = (character.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, "0");
  const name = CHARACTER_NAMES[hex];
  return name === undefined ? `U+${hex}` : `U+${hex} (${name})`;
}
