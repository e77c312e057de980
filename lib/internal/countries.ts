/**
 * The country codes that Square accepts, and suggestions for a value that is not one of them.
 *
 * The codes are those of `Square.Country` in the `square` package. They are repeated here because
 * loading the package takes about a second, and a run that sends nothing does not need it. A test
 * compares the two lists.
 */

/**
 * ISO 3166-1 codes, and ZZ for an unknown country. Square does not accept XK (Kosovo) and AN
 * (Netherlands Antilles).
 */
export const COUNTRIES: ReadonlySet<string> = new Set(
  `AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT
   BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH
   ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT
   HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS
   LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI
   NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG
   SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG
   UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW ZZ`.split(/\s+/),
);

// Common codes and names that Square does not accept, with the code of the country.
const CODES_BY_OTHER_NAME = new Map([
  ["UK", "GB"],
  ["EN", "GB"],
  ["ENG", "GB"],
  ["GBR", "GB"],
  ["U.K.", "GB"],
  ["ENGLAND", "GB"],
  ["SCOTLAND", "GB"],
  ["WALES", "GB"],
  ["GREAT BRITAIN", "GB"],
  ["USA", "US"],
  ["U.S.", "US"],
  ["U.S.A.", "US"],
  ["AMERICA", "US"],
  ["UNITED STATES OF AMERICA", "US"],
  ["CAN", "CA"],
  ["AUS", "AU"],
  ["DEU", "DE"],
  ["GER", "DE"],
  ["FRA", "FR"],
  ["ESP", "ES"],
  ["ITA", "IT"],
  ["IRL", "IE"],
  ["JPN", "JP"],
  ["JAP", "JP"],
  ["EL", "GR"],
]);

let codesByEnglishName: Map<string, string> | undefined;

/**
 * Suggests the code for a text that is not a code, for a hint in a message: GB for UK, US for USA,
 * DE for Germany. A value is never replaced by the suggestion, because the user may have meant
 * something else.
 */
export function suggestCountry(text: string): string | undefined {
  const name = text.toUpperCase();
  // The English names are built at first use, because most runs need no suggestion.
  codesByEnglishName ??= buildEnglishNames();
  return CODES_BY_OTHER_NAME.get(name) ?? codesByEnglishName.get(name);
}

function buildEnglishNames(): Map<string, string> {
  const names = new Intl.DisplayNames(["en"], { type: "region" });
  return new Map([...COUNTRIES].map((code) => [(names.of(code) ?? code).toUpperCase(), code]));
}
